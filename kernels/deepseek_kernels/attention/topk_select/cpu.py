"""The selection in C++: a radix select of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import observed
from ...common.masks import by_query

__all__ = ["select", "takes"]


def takes(scores: Tensor) -> bool:
    """Returns True if the C++ operator is made for these scores; all others are the reference's."""
    return scores.dtype == torch.float32 and scores.numel() > 0 and not observed(scores)


def select(scores: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """See `topk_select`."""
    return torch.ops.deepseek_kernels_cpu.topk_select(scores, top_k, by_query(mask, *scores.shape))
