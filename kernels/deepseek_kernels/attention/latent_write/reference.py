"""Norm, rotation and storing one after the other, as layers and caches do them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...norm.rms_norm import rms_norm_reference
from ..packed_latents import pack
from ..rope import rope_reference

__all__ = ["write"]


def write(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    """See `latent_write` and `latent_write_paged`."""
    if 0 in kv.shape or 0 in buffer.shape:
        return
    (batch, tokens, _), rank = kv.shape, weight.shape[0]
    latent, key = rms_norm_reference(kv[..., :rank], weight, eps), rope_reference(kv[..., rank:], cos, sin)
    states = torch.cat((latent if latent.dtype == kv.dtype else latent.to(kv.dtype), key), dim=-1)
    if buffer.dtype == torch.uint8:
        stored = pack(states, rank)
    else:
        stored = states if states.dtype == buffer.dtype else states.to(buffer.dtype)
    slots = slots.expand(batch, tokens)
    limit = buffer.shape[1] * (buffer.shape[0] if paged else 1)
    valid = (slots >= 0) & (slots < limit)
    if paged:
        first, second = slots // buffer.shape[1], slots % buffer.shape[1]
    else:
        first, second = torch.arange(batch, device=slots.device)[:, None].expand_as(slots), slots
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all()):
        buffer[first, second] = stored
        return
    _store_valid(buffer, first.flatten(), second.flatten(), valid.flatten(), stored.flatten(0, 1))


def _store_valid(buffer: Tensor, first: Tensor, second: Tensor, valid: Tensor, stored: Tensor) -> None:
    """Does `buffer[first, second] = stored` where valid, in shapes that do not depend on the number of valid rows.

    Other rows repeat the assignment of a valid one; if there is none, the value at [0, 0] is written to it again.
    """
    rows = torch.arange(len(valid), device=valid.device)
    chosen = torch.where(valid, rows, valid.int().argmax())
    valid = valid[chosen]
    first, second = torch.where(valid, first[chosen], 0), torch.where(valid, second[chosen], 0)
    buffer[first, second] = torch.where(valid[:, None], stored[chosen], buffer[first, second])
