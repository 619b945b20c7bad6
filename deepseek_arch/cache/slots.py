"""Slots of a latent cache: where the tokens of one forward pass go, and what their queries may see."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor

from ..config.argument_types import shown

__all__ = ["Slots", "key_mask_for_slots", "next_slots", "row_lengths", "spans_up_to"]


class Slots:
    """The slots that one forward pass writes to.

    Attributes:
        lengths: of the rows afterwards.
        longest: the largest of them.
        slots: int64 [B, T], as `LatentCache.append` yields them.
        valid: bool [B, T], or None.
        targets: `slots`, but -1 for tokens that are not stored.
    """

    def __init__(self, lengths: tuple[int, ...], slots: Tensor, valid: Tensor | None) -> None:
        self.lengths, self.slots, self.valid = lengths, slots, valid
        self.longest = max(lengths)
        self.targets = slots if valid is None else slots.masked_fill(~valid, -1)


def next_slots(lengths: tuple[int, ...], num_tokens: int, valid: Tensor | None, device: torch.device) -> Slots:
    """Returns the slots of the next tokens of rows that hold `lengths`; see `LatentCache.append`.

    Raises:
        ValueError: `valid` of another shape.
    """
    rows = torch.tensor(lengths, device=device)
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is None:
        slots = rows[:, None]
        if num_tokens != 1:
            slots = slots + torch.arange(num_tokens, device=device)
        return Slots(tuple(length + num_tokens for length in lengths), slots, None)
    if valid.shape != (len(lengths), num_tokens):
        raise ValueError(f"expected valid [{len(lengths)}, {num_tokens}], got {list(valid.shape)}")
    valid = valid.to(device)
    slots = (rows[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
    return Slots(tuple((rows + valid.sum(-1)).tolist()), slots, valid)


def key_mask_for_slots(slots: Tensor, lengths: tuple[int, ...], valid: Tensor | None) -> Tensor | None:
    """Returns the mask of attention to a cache whose token i lies in slot i: up to each query's own slot.

    Args:
        slots: int64 [B, T] of this call's tokens.
        lengths: tokens of the rows before this call.
        valid: bool [B, T]; None, or all True, where no token is padding.

    Returns:
        Spans [B, T, 2], or None where all rows are equally long and nothing is padding.
    """
    if len(set(lengths)) == 1 and (valid is None or bool(valid.all())):
        return None
    return spans_up_to(slots)


def spans_up_to(slots: Tensor) -> Tensor:
    """Returns spans [B, T, 2] of all slots up to each query's own, int64 [B, T]."""
    return torch.stack((torch.zeros_like(slots), slots + 1), dim=-1).int()


def row_lengths(lengths: int | Sequence[int] | Tensor, rows: int) -> tuple[int, ...]:
    """Returns one length for each row, given one for all or one for each."""
    if isinstance(lengths, Tensor) and (lengths.layout != torch.strided or lengths.is_meta):
        kind = f"{lengths.layout} on {lengths.device}"
        raise ValueError(f"expected lengths in a dense tensor with values, got one of layout {kind}")
    listed: Any = lengths.tolist() if hasattr(lengths, "tolist") else lengths  # also numpy's
    several = listed if isinstance(listed, list | tuple) else (listed,) * rows
    try:
        if isinstance(listed, bool) or any(isinstance(length, bool) for length in several):
            raise TypeError
        return tuple(as_index(length) for length in several)
    except TypeError:
        raise ValueError(f"expected an integer length, or a list of {rows}, got {shown(lengths)}") from None
