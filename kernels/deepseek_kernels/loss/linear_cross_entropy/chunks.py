"""What the two implementations share: the walk over chunks of tokens, the products, and what autograd makes of it.

Forward has the logits of a chunk in hand once. There it takes the loss and, where gradients are needed, turns the
logits into their own gradients and multiplies those right away: backward only scales what forward left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ... import dispatch
from ...gemm.dense_gemm import reference as dense

__all__ = ["Step", "connect", "walk"]

# (logits [rows, V], targets [rows], need_gradient) -> loss [rows], right [rows]; the logits become their gradients.
Step = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_HALF = (torch.bfloat16, torch.float16)
_ROWS = 512  # of the weight's gradient that are expanded to float32 at a time on a CPU
_SCALED = 1 << 24  # elements of the segments' gradients that are summed at a time


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What losses and the weight's gradient are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def walk(
    step: Step,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Sequence[int],
    chunk: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All chunks of tokens, one after the other, through one buffer of logits.

    Args:
        needs: whether the gradients of `hidden` and of `weight` are needed.

    Returns:
        loss [T] float32 and right [T] bool; the gradients of the summed loss, [T, H], and by segment [S, V, H] float32,
        empty where not needed.
    """
    tokens, wide = hidden.shape[0], accumulator(hidden.dtype)
    need_hidden, need_weight = needs
    losses = hidden.new_empty(tokens, dtype=wide)
    right = hidden.new_empty(tokens, dtype=torch.bool)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = hidden.new_zeros((len(segments), *weight.shape) if need_weight else 0, dtype=wide)
    buffer = hidden.new_empty(min(chunk, tokens), weight.shape[0])
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        logits = buffer[: rows.stop - start]
        _multiply(hidden[rows], weight, logits)
        losses[rows], right[rows] = step(logits, targets[rows], need_hidden or need_weight)
        if need_hidden:
            grad_hidden[rows] = _input_gradient(logits, weight)
        if need_weight:
            for segment, end in enumerate(accumulate(segments)):
                first, last = max(start, end - segments[segment]), min(rows.stop, end)
                if first < last:
                    part = logits[first - start : last - start]
                    _add_weight_gradient(grad_weight[segment], part, hidden[first:last])
    return losses, right, grad_hidden, grad_weight


def by_segment(values: Tensor, segments: Sequence[int]) -> Tensor:
    """Sums [S] over segments of [T]; the same bits in every run."""
    parts = values.split(list(segments))
    return torch.stack([part.sum() for part in parts]) if parts else values.new_zeros(0)


def _expands(x: Tensor) -> bool:
    return x.dtype in _HALF and x.device.type == "cpu" and not dispatch.native_half_matmul()


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if _expands(x) and x.shape[0] >= dense.MIN_ROWS:
        out.copy_(dense.multiply(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return dense.input_gradient(grad, weight) if _expands(grad) else torch.mm(grad, weight)


def _add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """`total` [V, H] += grad [rows, V].T @ x [rows, H]: float32 sums of half-precision products, never rounded."""
    if x.dtype == total.dtype:
        total.addmm_(grad.T, x)
    elif x.device.type == "cuda":
        torch.addmm(total, grad.T, x, out_dtype=total.dtype, out=total)
    elif _expands(x):
        wide = x.float()
        for start in range(0, total.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            total[rows].addmm_(grad[:, rows].float().T, wide)
    else:  # a CPU's 16-bit products come rounded; only the sum over chunks is in float32
        total += torch.mm(grad.T, x)


# ------------------------------------------------------------------ autograd


@torch.library.custom_op("deepseek_kernels::linear_cross_entropy_backward", mutates_args=())
def _scale(
    grad: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of the summed losses, times the gradients `grad` [S] of the segments' losses.

    `hidden` and `weight` are not read: their gradients depend on them, which second derivatives must not forget.
    """
    out_hidden, out_weight = _new_scaled(grad, grad_hidden, grad_weight, hidden, weight, segments)
    ends = list(accumulate(segments))
    factors = grad[:, None, None]  # not scalars, which would be rounded to 16 bits before they multiply
    if grad_hidden.ndim == 2:
        for segment, end in enumerate(ends):
            rows = slice(end - segments[segment], end)
            torch.mul(grad_hidden[rows], factors[segment], out=out_hidden[rows])
    if grad_weight.ndim == 3 and len(ends) == 1:
        torch.mul(grad_weight[0], factors[0], out=out_weight)
    elif grad_weight.ndim == 3:  # in parts, so that no second float32 copy of the gradients comes to be
        size = max(1, _SCALED // max(1, len(ends) * weight.shape[1]))
        for start in range(0, weight.shape[0], size):
            rows = slice(start, start + size)
            out_weight[rows] = (grad_weight[:, rows] * factors).sum(0)
    return out_hidden, out_weight


@_scale.register_fake
def _new_scaled(
    grad: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_hidden), weight.new_empty(grad_weight.shape[1:] if grad_weight.ndim == 3 else 0)


def _twice(ctx, *grads: Tensor) -> None:
    raise RuntimeError("linear_cross_entropy has no second derivatives; use linear and cross_entropy for those")


_scale.register_autograd(_twice)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Sequence[int],
    ignore_index: int,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
) -> Results:
    wide, count = accumulator(hidden.dtype), len(segments)
    return (
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
        hidden.new_empty(count, dtype=torch.int64),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        hidden.new_empty((count, *weight.shape) if need_weight else 0, dtype=wide),
    )


def _remember(ctx, inputs, output) -> None:
    hidden, weight, _, segments, *_ = inputs
    _, correct, count, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(correct, count, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # zeros as large as the weights, for outputs that have no gradient
    ctx.save_for_backward(grad_hidden, grad_weight, hidden, weight)
    ctx.segments = segments


def _differentiate(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if grad is None:
        return None, None, *nothing
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    grad_hidden, grad_weight = _scale(grad, *ctx.saved_tensors, ctx.segments)
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, *nothing


def connect(forward: CustomOpDef) -> None:
    """Gives `forward` its fake and its derivative.

    Args:
        forward: (hidden [T, H], weight [V, H], targets [T], segments, ignore_index, chunk, need_hidden, need_weight) ->
            loss [S], correct [S], count [S], gradient of hidden, gradient of weight by segment, as `walk` gives them.
    """
    forward.register_fake(_fake)
    forward.register_autograd(_differentiate, setup_context=_remember)
