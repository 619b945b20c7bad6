"""`mla_decode`: absorbed attention of few queries on the latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .reference import attend

__all__ = ["mla_decode"]

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
    if mask is not None and not (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1)):
        raise ValueError(f"expected a mask for all heads, [T, S] or [B, 1, T, S], got {list(mask.shape)}")
    dispatch.pick("mla_decode")
    q, states = dispatch.autocast(q, states)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return attend(q, states, scale, mask)
