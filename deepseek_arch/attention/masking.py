"""Attention masks for padding and packed documents, and the positions that go with them.

Masks are those of `deepseek_kernels.common.masks`: None for plain causal attention, or spans of keys.
Notation: B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_kernels.common.masks import causal_mask

__all__ = ["attention_mask_for_documents", "document_numbers", "positions_from_mask"]


def positions_from_mask(valid: Tensor | None, batch: int, tokens: int, device=None) -> Tensor:
    """Counts each row's real tokens from 0; padding gets its neighbour's position (TRAPS B9).

    Args:
        valid: bool [B, T], or None where there is no padding.

    Returns:
        int64 [B, T].
    """
    if valid is None:
        return torch.arange(tokens, device=device).expand(batch, -1)
    return (valid.cumsum(-1) - 1).clamp(min=0)


def document_numbers(position_ids: Tensor | None, valid: Tensor | None = None) -> Tensor | None:
    """Numbers the documents packed into each row: one starts wherever positions do not continue.

    Args:
        position_ids: [B, T], or None.
        valid: bool [B, T]; jumps within padding start no document.

    Returns:
        int64 [B, T], or None where every row is one document.
    """
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    starts = (position_ids != position_ids.roll(1, -1) + 1) & ~_first_column(position_ids)
    if valid is not None:
        starts = starts & valid & valid.roll(1, -1)
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return starts.long().cumsum(-1)


def attention_mask_for_documents(documents: Tensor | None, valid: Tensor | None, batch: int) -> Tensor | None:
    """Returns the mask of causal attention within documents and among real tokens, without a cache.

    Padding on the right needs no mask: no real token comes after it. A query without any key attends to itself, so that
    no row of the softmax is empty.

    Args:
        documents, valid: [B or 1, T].

    Returns:
        None if plain causal attention does. Spans [B, T, 2], or bool [B, 1, T, T] where padding interrupts a document
        (or could, as far as the compiler knows).
    """
    if valid is not None and not torch.compiler.is_compiling() and bool((valid[:, :-1] >= valid[:, 1:]).all()):
        valid = None
    given = documents if documents is not None else valid
    if given is None:
        return None
    tokens, device = given.shape[1], given.device
    index = torch.arange(tokens, device=device)
    starts = index.expand(batch, -1) == 0 if documents is None else _changes(documents).expand(batch, -1)
    if valid is not None:
        begins = valid & (starts | ~valid.roll(1, -1) | _first_column(valid))
        if torch.compiler.is_compiling() or not _one_run_each(begins, starts):
            return _dense(documents, valid)
        starts = starts | _changes(valid)
    first = torch.where(starts, index, 0).cummax(-1).values  # of the run of tokens that each is in
    if valid is not None:
        first = torch.where(valid, first, index)
    return torch.stack((first, (index + 1).expand_as(first)), dim=-1).int()


def _changes(x: Tensor) -> Tensor:
    """Marks where a value of [B, T] differs from the one before it, and the first; bool."""
    return (x != x.roll(1, -1)) | _first_column(x)


def _first_column(x: Tensor) -> Tensor:
    """Marks the first column of [B, T]; bool [T].

    With it, a comparison of neighbours rolls a whole row. A slice of T - 1 columns would bind an exported program with
    a symbolic T to lengths where T - 1 is not 1.
    """
    return torch.arange(x.shape[1], device=x.device) == 0


def _one_run_each(begins: Tensor, starts: Tensor) -> bool:
    """Returns True if no document has two runs of real tokens, given the beginnings of runs and of documents."""
    runs = begins.long().cumsum(-1)
    before = torch.where(starts, runs - begins.long(), 0).cummax(-1).values  # runs of the documents before
    return bool((runs - before <= 1).all())


def _dense(documents: Tensor | None, valid: Tensor) -> Tensor:
    """Returns the mask as bool [B, 1, T, T]."""
    tokens = valid.shape[1]
    allowed = causal_mask(tokens, tokens, valid.device) & valid[:, None, :]  # [B, T, T]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    return (allowed | torch.eye(tokens, dtype=torch.bool, device=valid.device))[:, None]
