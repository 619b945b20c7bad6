"""Absorbed attention on a packed cache: tiles of keys, dequantized one at a time and merged by an online softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpack

_TILE = 1024  # tokens that are dequantized at a time, over all rows of the batch: 2.4 MB for V3
_LEAST = 64  # ... and keys of a row, however many rows there are


def attend_packed(q: Tensor, packed: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """See `mla_decode`. In float32, or the queries' own dtype where that is wider."""
    batch, queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    folded = (q.to(dtype) * scale).reshape(batch, queries * heads, -1)
    q_latent, q_key = folded[..., :kv_lora_rank], folded[..., kv_lora_rank:]
    if mask is not None:
        mask = _by_query(mask, packed.shape[1])
    # Of each row: the greatest score so far, and the sums of exponentials and of latents relative to it.
    top = folded.new_full((batch, queries * heads, 1), -torch.inf)
    total, out = torch.zeros_like(top), folded.new_zeros(batch, queries * heads, kv_lora_rank)
    tile = max(_LEAST, _TILE // batch)
    for start in range(0, packed.shape[1], tile):
        latents, keys = unpack(packed[:, start : start + tile], kv_lora_rank, dtype)
        scores = q_latent @ latents.mT + q_key @ keys.mT  # [B, T N, tile]
        if mask is not None:
            part = mask[..., start : start + tile]
            each = scores.view(batch, queries, heads, -1)
            each = each.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else each + part
            scores = each.view(scores.shape)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0.0)  # of a row that has attended to nothing so far
        weights, shrink = (scores - base).exp(), (top - base).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ latents
        top = higher
    out = (out / total).masked_fill(total == 0, 0.0)
    return out.view(batch, queries, heads, kv_lora_rank).to(q.dtype)


def _by_query(mask: Tensor, keys: int) -> Tensor:
    """[T, S] or [B, 1, T, S], any of them 1, -> [B, T, 1, S], which broadcasts to the scores of all heads."""
    mask = mask[None, None] if mask.ndim == 2 else mask
    return mask.transpose(1, 2).expand(-1, -1, -1, keys)
