"""Launches the kernel of `topk_select`: a custom operator, opaque to torch.compile.

Nothing here looks at values on the device, so that everything can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.host import cdiv, power_of_two, rows_readable
from ...common.masks import kernel_arguments
from . import kernel
from .configs import LEAST, MOST, block_for, rows_for, warps_for

__all__ = ["select"]


@torch.library.custom_op("deepseek_kernels::topk_select", mutates_args=())
def select(scores: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    out = _new(scores, top_k, mask)
    if not out.numel():
        return out
    (batch, queries, keys), top_k = scores.shape, out.shape[2]
    scores, seen = rows_readable(scores), kernel_arguments(mask, batch, queries, keys)
    rows = batch * queries
    some = rows if keys <= MOST else rows_for(keys, top_k)
    with torch.cuda.device_of(scores):
        for first in range(0, rows, some):
            number = min(some, rows - first)
            target = out.view(rows, top_k)[first : first + number]
            sizes = {"first_row": first, "queries": queries, "count": keys, "strides": scores.stride()[:2]}
            _select(number, {"scores": scores, "indices": None, **sizes, **seen}, target)
    return out


@select.register_fake
def _new(scores: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    batch, queries, keys = scores.shape
    return scores.new_empty(batch, queries, min(top_k, keys), dtype=torch.int32)


def _select(rows: int, arguments: dict[str, Any], out: Tensor) -> None:
    """Selects in some rows, in one launch or, where a row has more keys than a program holds, in several."""
    top_k, device = out.shape[1], out.device
    while True:
        chunk = min(arguments["count"], MOST)
        chunks = cdiv(arguments["count"], chunk)
        kept, target = None, out
        if chunks > 1:
            kept = torch.empty(rows, chunks * top_k, dtype=torch.float32, device=device)
            target = torch.empty(rows, chunks * top_k, dtype=torch.int32, device=device)
        block = block_for(chunk)
        kernel.select_kernel[(rows * chunks,)](
            **arguments,
            **{"out": target, "kept": kept, "chunk": chunk, "top_k": top_k},
            **{"BLOCK": block, "SLOTS": power_of_two(top_k), "LEAST": LEAST},
            num_warps=warps_for(block),
        )
        if kept is None:
            return
        arguments = {
            **{"scores": kept, "indices": target, "first_row": 0, "queries": rows, "count": chunks * top_k},
            **{"strides": (0, chunks * top_k), "MASK": "none", "mask": None, "mask_strides": (0, 0, 0)},
        }
