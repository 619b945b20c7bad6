"""Attention masks: the values that the attention operators take as their argument `mask`.

- None: causal, the last query aligned with the last key (TRAPS B8): of T queries on S keys, query t sees the keys
  0 to S - T + t.
- int32 [B, T, 2], spans: query t of row b sees the keys from `span[b, t, 0]` to `span[b, t, 1] - 1`. Rows of different
  length in a cache, padding on the left and packed documents are of this kind. Parts outside the keys are cut off, and
  an empty span sees nothing.
- bool (True attends) or additive float, broadcastable to [B, 1, T, S]: anything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_dense",
    "by_query",
    "causal_mask",
    "check_visibility",
    "is_spans",
    "kernel_arguments",
    "visible_keys",
]


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


def by_query(mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor | None:
    """Views a dense mask as [B, T, S], as the C++ operators take it; returns the other kinds unchanged."""
    if mask is None or is_spans(mask):
        return mask
    return (mask if mask.ndim == 2 else mask[:, 0]).expand(batch, queries, keys)


def causal_mask(queries: int, keys: int, device=None) -> Tensor:
    """Returns the causal mask, for which None stands, as bool [T, S]."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def visible_keys(mask: Tensor | None, first: int, last: int, queries: int, keys: int, device=None) -> Tensor:
    """Returns the keys that the queries `first` to `last - 1` see, bool [B or 1, last - first, S].

    Args:
        mask: None, spans or bool, of all T queries (`check_visibility`).
        queries, keys: T and S.
    """
    index = torch.arange(keys, device=device)
    if mask is None:
        ends = torch.arange(first, last, device=device) + keys - queries
        return (index <= ends[:, None])[None]
    if is_spans(mask):
        part = mask[:, first:last]
        return (index >= part[..., :1]) & (index < part[..., 1:])
    dense = mask[None] if mask.ndim == 2 else mask[:, 0]
    dense = dense if dense.shape[1] == 1 else dense[:, first:last]
    return dense.expand(-1, last - first, keys)


def check_visibility(mask: Tensor | None, batch: int, queries: int, keys: int) -> None:
    """Checks a mask that only says which keys a query sees: None, spans [B, T, 2], or bool [T, S] or [B, 1, T, S].

    Raises:
        ValueError: it is of another kind or shape.
    """
    if mask is None:
        return
    if is_spans(mask):
        if mask.shape != (batch, queries, 2):
            raise ValueError(f"expected spans [{batch}, {queries}, 2], got {list(mask.shape)}")
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of int32 (spans) or bool, got {mask.dtype}")
    full = (batch, 1, queries, keys)
    fits = mask.ndim in (2, 4) and all(
        size in (most, 1) for size, most in zip(mask.shape, full[-mask.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"expected a mask for all heads, [T, S] or [B, 1, T, S], got {list(mask.shape)} for {list(full)}"
        )


def kernel_arguments(mask: Tensor | None, batch: int, queries: int, keys: int) -> dict[str, Any]:
    """Returns the arguments MASK, `mask` and `mask_strides` of a kernel for a mask that `check_visibility` accepts.

    Strides are those of batch, query and key, in bytes, and zeros where the mask is not dense.
    """
    if mask is None:
        return {"MASK": "causal", "mask": None, "mask_strides": (0, 0, 0)}
    if is_spans(mask):
        return {"MASK": "spans", "mask": mask.contiguous(), "mask_strides": (0, 0, 0)}
    full = mask.expand(batch, 1, queries, keys)
    strides = full.stride(0), full.stride(2), full.stride(3)
    return {"MASK": "dense", "mask": full.view(torch.uint8), "mask_strides": strides}
