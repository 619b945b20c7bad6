"""Attention on selected keys in C++: a query's keys are gathered tile by tile, all of its heads attend to each tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import needs_gradient

__all__ = ["attend", "takes"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(q: Tensor, states: Tensor, ids: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    return (
        q.dtype in _DTYPES
        and q.shape[1] > 1  # of one query, a thread each takes a part of the keys: `mla_decode`
        and 0 not in (q.numel(), states.numel(), ids.numel())
        and states.stride(2) == 1
        and not needs_gradient(q, states)
    )


def attend(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    """See `sparse_mla`."""
    return torch.ops.deepseek_kernels_cpu.sparse_mla(q, states, ids, kv_lora_rank, scale)
