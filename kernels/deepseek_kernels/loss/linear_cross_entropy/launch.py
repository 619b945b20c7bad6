"""Launches the kernel of `linear_cross_entropy`: a custom operator, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel
from .backward import Results, connect
from .configs import COLUMNS, NUM_WARPS
from .reference import by_segment, walk

__all__ = ["linear_cross_entropy_triton"]


@torch.library.custom_op("deepseek_kernels::linear_cross_entropy_triton", mutates_args=())
def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, segments: list[int], ignored: int, chunk: int, needs: list[bool]
) -> Results:
    def step(logits: Tensor, targets: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor]:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        right = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
        arguments = (logits, targets, losses, right, logits.shape[1], logits.stride(0), ignored)
        with torch.cuda.device_of(logits):
            kernel.cross_entropy_kernel[(logits.shape[0],)](
                *arguments, COLUMNS=COLUMNS, GRADIENT=need_gradient, num_warps=NUM_WARPS
            )
        return losses, right

    # Only the device knows the number of ignored rows, so they are computed; as zeros, since a gradient of zero times a
    # NaN that stands in one would be a NaN of the weight's gradient.
    skipped = targets == ignored
    hidden = hidden.masked_fill(skipped[:, None], 0)
    losses, right, *gradients = walk(step, hidden, weight, targets.contiguous(), segments, chunk, needs)
    correct, count = by_segment(right, segments), by_segment(~skipped, segments)
    return by_segment(losses, segments), correct, count, gradients[0], gradients[1]


connect(linear_cross_entropy_triton)
