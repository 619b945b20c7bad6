"""Linear cross-entropy in PyTorch: the rows that have a target, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import accumulator, by_segment, connect, walk

__all__ = ["CHUNK_BYTES", "linear_cross_entropy_reference"]

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


@torch.library.custom_op("deepseek_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Sequence[int],
    ignore_index: int,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    valid = targets != ignore_index
    count = by_segment(valid, segments)
    everything = bool(valid.all())
    if not everything:  # ignored rows are not computed, so that nothing in them can reach a gradient
        hidden, targets = hidden[valid], targets[valid]
    lengths = segments if everything else count.tolist()
    losses, right, grad_hidden, grad_weight = walk(
        _step, hidden, weight, targets, lengths, chunk, (need_hidden, need_weight)
    )
    if need_hidden and not everything:
        compact, grad_hidden = grad_hidden, grad_hidden.new_zeros(valid.shape[0], hidden.shape[1])
        grad_hidden[valid] = compact
    return by_segment(losses, lengths), by_segment(right, lengths), count, grad_hidden, grad_weight


connect(linear_cross_entropy_reference)
