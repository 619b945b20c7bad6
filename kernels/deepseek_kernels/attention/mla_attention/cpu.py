"""Attention of many queries in C++: an online softmax over tiles of keys, in bfloat16 where the CPU multiplies that."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import observed
from ...common.masks import by_query, is_spans

__all__ = ["attend", "takes"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(q: Tensor, kv: Tensor, key: Tensor, scale: float, mask: Tensor | None, dropout: float) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    return (
        q.dtype in _DTYPES
        and 0 not in (q.numel(), kv.numel(), key.numel())
        and kv.shape[3] > q.shape[3] - key.shape[2] > 0
        and scale > 0
        and not dropout
        and (mask is None or is_spans(mask) or mask.dtype == torch.bool)
        and not observed(q, kv, key)
    )


def attend(q: Tensor, kv: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """See `mla_attention`."""
    mask = by_query(mask, q.shape[0], q.shape[1], kv.shape[1])
    out, _ = torch.ops.deepseek_kernels_cpu.mla_attention(q, kv, key, mask, scale)
    return out
