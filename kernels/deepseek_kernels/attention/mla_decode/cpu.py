"""Absorbed attention in C++: keys are read where they are, those of a packed cache a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import needs_gradient
from ...common.masks import by_query, is_spans

__all__ = ["decode", "decode_paged", "takes"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW_QUERIES = 16  # whose threads share out keys; those of more queries share out the queries


def takes(q: Tensor, states: Tensor, mask: Tensor | None, scale: float, paged: bool = False) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    return (
        q.dtype in _DTYPES
        and (q.shape[1] <= _FEW_QUERIES or (scale > 0 and not paged))
        and q.numel() > 0
        and states.numel() > 0
        and states.stride(2) == 1
        and (mask is None or is_spans(mask) or mask.dtype == torch.bool)
        and not needs_gradient(q, states)
    )


def decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """See `mla_decode`."""
    mask = by_query(mask, q.shape[0], q.shape[1], states.shape[1])
    library = torch.ops.deepseek_kernels_cpu
    run = library.mla_decode if q.shape[1] <= _FEW_QUERIES else library.mla_prefill
    return run(q, states, kv_lora_rank, scale, mask)


def decode_paged(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    """See `mla_decode_paged`."""
    return torch.ops.deepseek_kernels_cpu.mla_decode_paged(q, pages, block_table, lengths, kv_lora_rank, scale)
