"""Scores of the indexer in C++: products of a tile of keys with all heads of a query, added up while in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import needs_gradient
from ...common.masks import by_query

__all__ = ["scores", "takes"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


def takes(q: Tensor, keys: Tensor, weights: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    return q.dtype in _DTYPES and 0 not in (q.numel(), keys.numel()) and not needs_gradient(q, keys, weights)


def scores(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """See `indexer_scores`."""
    return torch.ops.deepseek_kernels_cpu.indexer_scores(
        q, keys, weights, by_query(mask, q.shape[0], q.shape[1], keys.shape[1])
    )
