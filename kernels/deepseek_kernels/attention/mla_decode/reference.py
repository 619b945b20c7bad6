"""Absorbed attention on PyTorch's own attention kernels, and on a packed cache tile by tile.

All heads read the same keys. For few queries heads therefore become rows of one product, so that keys are read once
and not once a head; for more queries the mask of such a product would outgrow the keys, and heads stay heads.
A packed cache is dequantized one tile of keys at a time; an online softmax merges the tiles.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.masks import as_dense, causal_mask
from ..packed_latents import unpack

__all__ = ["attend", "attend_packed", "decode", "decode_paged"]

_FOLD_LIMIT = 16  # queries
_PART = 1024  # keys that are worth a thread of their own
_TILE = 1024  # packed tokens that are dequantized at a time, over all rows of the batch: 2.4 MB for V3
_LEAST = 64  # ... and keys of a row, however many rows there are


def decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """See `mla_decode`."""
    queries, keys = q.shape[1], states.shape[1]
    if 0 in q.shape or not keys:
        return q.new_zeros(*q.shape[:3], kv_lora_rank)
    if mask is None and queries > 1:
        mask = causal_mask(queries, keys, q.device)
    if mask is not None:
        mask = as_dense(mask, keys)
    if states.dtype != torch.uint8:
        # The last R columns are the rotated keys' weighted sum, which is no part of the result.
        return attend(q, states, scale, mask)[..., :kv_lora_rank]
    kind = q.device.type
    # Computed in float32 on purpose; a meta device has no autocast.
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        return attend_packed(q, states, kv_lora_rank, scale, mask)


def decode_paged(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    """See `mla_decode_paged`: gathers all pages and attends to them with a span for each query."""
    queries, (_, size, width) = q.shape[1], pages.shape
    most = block_table.shape[1] * size
    if not most or not pages.shape[0] or not q.numel():
        return q.new_zeros(*q.shape[:3], kv_lora_rank)
    exists = torch.arange(most, device=lengths.device) < lengths[:, None]  # [B, S]
    # Neither a page that does not exist nor memory beyond the row's length, NaN perhaps, may be read.
    existing = torch.where(exists[:, ::size], block_table, 0)
    states = pages[existing].view(-1, most, width).masked_fill(~exists[..., None], 0)
    ends = lengths[:, None] - queries + 1 + torch.arange(queries, device=lengths.device)  # [B, T]
    spans = torch.stack((torch.zeros_like(ends), ends), dim=-1).int()
    return decode(q, states, kv_lora_rank, scale, spans)


def attend(q: Tensor, states: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention to all keys, or to those of a dense mask -> [B, T, N, C + R]."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    batch, queries, heads, _ = q.shape
    shared = states[:, None]  # [B, 1, S, D]
    if queries > _FOLD_LIMIT:
        shared = shared.expand(-1, heads, -1, -1)
        return F.scaled_dot_product_attention(q.transpose(1, 2), shared, shared, mask, scale=scale).transpose(1, 2)
    folded = q.reshape(batch, 1, queries * heads, -1)
    parts = _parts(folded, states, mask)
    if parts > 1:
        return _attend_in_parts(folded, states, scale, parts).view(q.shape)
    rows = mask if mask is None or mask.shape[-2] == 1 else mask.repeat_interleave(heads, dim=-2)
    return F.scaled_dot_product_attention(folded, shared, shared, rows, scale=scale).view(q.shape)


def _parts(folded: Tensor, states: Tensor, mask: Tensor | None) -> int:
    """Returns the number of parts to cut the keys into, so that every CPU thread has some.

    PyTorch's CPU kernel distributes (row of the batch, head, block of queries); one row with one head and a block of
    queries leaves all threads but one idle. Gradients and masks are not worth the effort: both come with more queries.
    """
    idle = folded.device.type == "cpu" and folded.shape[0] == 1 and folded.shape[2] <= 32 and mask is None
    inference = not (torch.is_grad_enabled() and (folded.requires_grad or states.requires_grad))
    if not idle or not inference or torch.compiler.is_compiling():
        return 1
    return min(torch.get_num_threads(), states.shape[1] // _PART)


def _attend_in_parts(folded: Tensor, states: Tensor, scale: float, parts: int) -> Tensor:
    """Attention on each part of the keys as a row of the batch, merged by the parts' sums of exponentials.

    Args:
        folded: [1, 1, rows, D].
        states: [1, S, D].
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    step = states.shape[1] // parts
    cut = states[:, : step * parts].view(parts, 1, step, -1)
    outs, sums = attention(folded.expand(parts, -1, -1, -1), cut, cut, scale=scale)  # [parts, 1, rows, D], log sums
    outs, sums = outs.float(), sums.reshape(parts, 1, -1, 1)
    rest = states[:, None, step * parts :]
    if rest.shape[2]:
        out, log_sum = attention(folded, rest, rest, scale=scale)
        outs, sums = torch.cat((outs, out.float())), torch.cat((sums, log_sum.reshape(1, 1, -1, 1)))
    return (outs * sums.softmax(0)).sum(0, keepdim=True).to(folded.dtype)


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
    """Views [T, S] or [B, 1, T, S], any of them 1, as [B, T, 1, S], which broadcasts to the scores of all heads."""
    mask = mask[None, None] if mask.ndim == 2 else mask
    return mask.transpose(1, 2).expand(-1, -1, -1, keys)
