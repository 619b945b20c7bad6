"""The derivative of both implementations: the forward pass has computed it, the backward pass only scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["Results", "accumulator", "connect"]

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_SCALED = 1 << 24  # elements of the segments' gradients that are summed at a time


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which losses and the weight's gradient are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("deepseek_kernels::linear_cross_entropy_backward", mutates_args=())
def _scale(
    grad: Tensor, grad_hidden: Tensor, grad_weight: Tensor, hidden: Tensor, weight: Tensor, segments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Multiplies the gradients of the summed losses by the gradients `grad` [S] of the segments' losses.

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
    elif grad_weight.ndim == 3:  # in parts, so that there is no second float32 copy of the gradients
        size = max(1, _SCALED // max(1, len(ends) * weight.shape[1]))
        for start in range(0, weight.shape[0], size):
            rows = slice(start, start + size)
            out_weight[rows] = (grad_weight[:, rows] * factors).sum(0)
    return out_hidden, out_weight


@_scale.register_fake
def _new_scaled(
    grad: Tensor, grad_hidden: Tensor, grad_weight: Tensor, hidden: Tensor, weight: Tensor, segments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_hidden), weight.new_empty(grad_weight.shape[1:] if grad_weight.ndim == 3 else 0)


def _twice(ctx, *grads: Tensor) -> None:
    raise RuntimeError("linear_cross_entropy has no second derivatives; use linear and cross_entropy for those")


_scale.register_autograd(_twice)


def _new_results(
    hidden: Tensor, weight: Tensor, targets: Tensor, segments: list[int], ignored: int, chunk: int, needs: list[bool]
) -> Results:
    wide, count = accumulator(hidden.dtype), len(segments)
    return (
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
        hidden.new_empty(count, dtype=torch.int64),
        hidden.new_empty(hidden.shape if needs[0] else 0),
        hidden.new_empty((count, *weight.shape) if needs[1] else 0, dtype=wide),
    )


def _save(ctx, inputs, output) -> None:
    hidden, weight, _, segments, *_ = inputs
    _, correct, count, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(correct, count, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # zeros as large as the weights, for outputs that have no gradient
    ctx.save_for_backward(grad_hidden, grad_weight, hidden, weight)
    ctx.segments = segments


def _differentiate(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    others = (None,) * 5
    if grad is None:
        return None, None, *others
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    grad_hidden, grad_weight = _scale(grad, *ctx.saved_tensors, ctx.segments)
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, *others


def connect(forward: CustomOpDef) -> None:
    """Registers the derivative of `forward`, and its shapes for torch.compile.

    Args:
        forward: (hidden [T, H], weight [V, H], targets [T], segments, ignored, chunk, needs) -> loss [S], correct [S],
            count [S], gradient of hidden, gradient of weight by segment, the gradients as `walk` returns them.
    """
    forward.register_fake(_new_results)
    forward.register_autograd(_differentiate, setup_context=_save)
