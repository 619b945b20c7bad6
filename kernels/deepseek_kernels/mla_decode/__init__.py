"""`mla_decode`: absorbed attention of few queries on the latent cache, as it is or packed in FP8 (see `packing`)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .. import dispatch
from .packed import attend_packed
from .packing import packed_bytes
from .reference import attend

__all__ = ["mla_decode", "mla_decode_packed"]

dispatch.register("mla_decode")


def mla_decode(q: Tensor, states: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of all heads on one shared sequence of keys, which are their own values.

    Args:
        q: [B, T, N, D], queries in the space of the latents (D = kv_lora_rank + qk_rope_head_dim).
        states: [B, S, D], latents and rotated keys side by side.
        scale: of the scores.
        mask: bool (True attends) or additive, broadcastable to [B, 1, T, S]; None attends to everything. A row that
            attends to nothing gives zeros.

    Returns:
        [B, T, N, D] in `q.dtype`; the first kv_lora_rank columns are the weighted latents.

    Raises:
        ValueError: the shapes do not fit.
    """
    if q.ndim != 4 or states.ndim != 3 or q.shape[0] != states.shape[0] or q.shape[3] != states.shape[2]:
        raise ValueError(f"expected q [B, T, N, D] and states [B, S, D], got {list(q.shape)} and {list(states.shape)}")
    _check_mask(mask)
    dispatch.pick("mla_decode")
    q, states = dispatch.autocast(q, states)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return attend(q, states, scale, mask)


def mla_decode_packed(q: Tensor, packed: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """`mla_decode` on tokens in bytes, without ever holding all of them dequantized.

    Args:
        q: [B, T, N, D], as for `mla_decode`.
        packed: uint8 [B, S, bytes] from `packing.pack`; its layout follows from `kv_lora_rank` and D.
        kv_lora_rank: C, how much of D is latent.
        scale, mask: as for `mla_decode`.

    Returns:
        [B, T, N, C] in `q.dtype`, the weighted latents. Differentiable in q.

    Raises:
        ValueError: the shapes or the dtype do not fit.
    """
    width = packed_bytes(kv_lora_rank, q.shape[-1] - kv_lora_rank)
    fits = q.ndim == 4 and packed.ndim == 3 and q.shape[0] == packed.shape[0] and packed.shape[2] == width
    if not fits or packed.dtype != torch.uint8:
        raise ValueError(
            f"expected q [B, T, N, D] and packed uint8 [B, S, {width}] for a latent of {kv_lora_rank}, got "
            f"{list(q.shape)} and {packed.dtype} {list(packed.shape)}"
        )
    _check_mask(mask)
    dispatch.pick("mla_decode")
    (q,) = dispatch.autocast(q)
    kind = q.device.type
    # What follows is float32 on purpose; a meta device has no autocast.
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        return attend_packed(q, packed, kv_lora_rank, scale, mask)


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and not (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)):
        raise ValueError(f"expected a mask for all heads, [T, S] or [B, 1, T, S], got {list(mask.shape)}")
