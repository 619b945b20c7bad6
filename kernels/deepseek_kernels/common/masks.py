"""Attention masks: the values that the attention operators take as their argument `mask`.

- None: causal, the last query aligned with the last key (TRAPS B8): of T queries on S keys, query t sees the keys
  0 to S - T + t.
- int32 [B, T, 2], spans: query t of row b sees the keys from `span[b, t, 0]` to `span[b, t, 1] - 1`. Rows of different
  length in a cache, padding on the left and packed documents are of this kind. Parts outside the keys are cut off, and
  an empty span sees nothing.
- bool (True attends) or additive float, broadcastable to [B, 1, T, S]: anything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_dense", "causal_mask", "is_spans"]


def is_spans(mask: Tensor | None) -> bool:
    """Tells if `mask` is spans, the second kind."""
    return mask is not None and mask.dtype == torch.int32


def as_dense(mask: Tensor | None, keys: int) -> Tensor | None:
    """Returns spans as bool [B, 1, T, S], and every other mask unchanged."""
    if not is_spans(mask):
        return mask
    assert mask is not None
    index = torch.arange(keys, device=mask.device)
    return ((index >= mask[..., :1]) & (index < mask[..., 1:]))[:, None]


def causal_mask(queries: int, keys: int, device=None) -> Tensor:
    """Returns the causal mask, for which None stands, as bool [T, S]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
