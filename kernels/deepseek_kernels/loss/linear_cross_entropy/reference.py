"""Linear cross-entropy in PyTorch: the rows that have a target, chunk by chunk. The kernels take the same walk.

The forward pass has the logits of a chunk once. There it computes the loss and, where gradients are needed, turns the
logits into their own gradients and multiplies those right away: the backward pass only scales the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ...common import half_products
from ...common.float32_products import by_onednn, product
from .backward import Results, accumulator, connect

__all__ = ["CHUNK_BYTES", "Step", "by_segment", "linear_cross_entropy_reference", "walk"]

# (logits [rows, V], targets [rows], need_gradient) -> loss [rows], right [rows]; the logits become their gradients.
Step = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]

CHUNK_BYTES = 128 << 20  # of float32 logits: 256 tokens of V3's vocabulary


def _step(logits: Tensor, targets: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor]:
    logarithms = logits.to(accumulator(logits.dtype)).log_softmax(-1)
    at = targets[:, None]
    loss = -logarithms.gather(1, at)[:, 0]
    right = (logits.argmax(-1) == targets) & ~loss.isnan()
    if need_gradient:
        gradient = logarithms.exp_()
        logits.copy_(gradient.scatter_(1, at, gradient.gather(1, at) - 1))
    return loss, right


def walk(
    step: Step,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Sequence[int],
    chunk: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes all chunks of tokens, one after the other, through one buffer of logits.

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
    """Returns sums [S] over segments of [T]; the same bits in every run."""
    parts = values.split(list(segments))
    return torch.stack([part.sum() for part in parts]) if parts else values.new_zeros(0)


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if half_products.expands(x) and x.shape[0] >= half_products.MIN_ROWS:
        out.copy_(half_products.multiply(x, weight))
    elif by_onednn(x, weight):
        out.copy_(product(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if half_products.expands(grad):
        return half_products.input_gradient(grad, weight)
    return product(grad, weight.T) if by_onednn(grad, weight.T) else torch.mm(grad, weight)


def _add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """`total` [V, H] += grad [rows, V].T @ x [rows, H]: float32 sums of half-precision products, never rounded."""
    if x.dtype == total.dtype:
        if by_onednn(grad.T, x.T):
            total += product(grad.T, x.T)
        else:
            total.addmm_(grad.T, x)
    elif x.device.type == "cuda":
        torch.addmm(total, grad.T, x, out_dtype=total.dtype, out=total)
    elif half_products.expands(x):
        half_products.add_weight_gradient(grad, x, total)
    else:  # a CPU's 16-bit products come rounded; only the sum over chunks is in float32
        total += torch.mm(grad.T, x)


@torch.library.custom_op("deepseek_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, segments: list[int], ignored: int, chunk: int, needs: list[bool]
) -> Results:
    valid = targets != ignored
    count = by_segment(valid, segments)
    everything = bool(valid.all())
    if not everything:  # ignored rows are not computed, so that nothing in them can reach a gradient
        hidden, targets = hidden[valid], targets[valid]
    lengths = segments if everything else count.tolist()
    losses, right, grad_hidden, grad_weight = walk(_step, hidden, weight, targets, lengths, chunk, needs)
    if needs[0] and not everything:
        compact, grad_hidden = grad_hidden, grad_hidden.new_zeros(valid.shape[0], hidden.shape[1])
        grad_hidden[valid] = compact
    return by_segment(losses, lengths), by_segment(right, lengths), count, grad_hidden, grad_weight


connect(linear_cross_entropy_reference)
