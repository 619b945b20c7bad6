"""Who may attend to whom: padding, packed documents, and rows of different length in a cache.

Masks are bool, True where a query attends, [B, 1, T, S]; None is plain causal attention, the last query aligned with
the last key. B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mask_for_documents", "document_numbers", "key_mask_for_slots", "positions_from_mask"]


def positions_from_mask(valid: Tensor | None, batch: int, tokens: int, device=None) -> Tensor:
    """Positions that count each row's real tokens from 0; padding repeats its neighbour's (TRAPS B9).

    Args:
        valid: bool [B, T], or None where nothing is padding.

    Returns:
        int64 [B, T].
    """
    if valid is None:
        return torch.arange(tokens, device=device).expand(batch, -1)
    return (valid.cumsum(-1) - 1).clamp(min=0)


def document_numbers(position_ids: Tensor | None, valid: Tensor | None = None) -> Tensor | None:
    """Numbers the documents that `position_ids` packs into each row: a document starts where positions do not go on.

    Args:
        position_ids: [B, T], or None.
        valid: bool [B, T]; jumps within padding start no document.

    Returns:
        int64 [B, T], or None where every row is one document.
    """
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if valid is not None:
        starts = starts & valid[:, 1:] & valid[:, :-1]
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0))


def attention_mask_for_documents(documents: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Causal attention within documents and among real tokens, without a cache; None where plain causal will do.

    Padding on the right needs no mask: no real token comes after it. A query that may see nothing sees itself, so that
    no row of the softmax is empty.
    """
    if valid is not None and not torch.compiler.is_compiling() and bool((valid[:, :-1] >= valid[:, 1:]).all()):
        valid = None
    if documents is None and valid is None:
        return None
    some = documents if documents is not None else valid
    assert some is not None
    tokens = some.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=some.device).tril()[None]  # [1, T, T]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    if valid is not None:
        allowed = allowed & valid[:, None, :]
    itself = torch.eye(tokens, dtype=torch.bool, device=some.device)
    return (allowed | itself)[:, None]


def key_mask_for_slots(slots: Tensor, lengths: tuple[int, ...], tokens: int, valid: Tensor | None) -> Tensor | None:
    """Attention to a cache whose token i lies in slot i: each query sees the slots up to its own.

    Args:
        slots: int64 [B, T] of this call's tokens.
        lengths: what the rows held before this call.
        valid: bool [B, T]; None, or all True, where no token is padding.

    Returns:
        bool [B, 1, T, S], or None where all rows are equally long and nothing is padding.
    """
    if len(set(lengths)) == 1 and (valid is None or bool(valid.all())):
        return None
    held = max(lengths) + tokens if valid is None else int((slots.amax(-1) + 1).max())
    return (torch.arange(held, device=slots.device) <= slots[:, :, None])[:, None]
