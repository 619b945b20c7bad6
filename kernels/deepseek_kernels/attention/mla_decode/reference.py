"""Absorbed attention on PyTorch's own attention kernels.

All heads read the same keys. For few queries heads therefore become rows of one product, so that keys are read once
and not once a head; for more queries the mask of such a product would outgrow the keys, and heads stay heads.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.masks import as_dense, causal_mask
from .packed import attend_packed

__all__ = ["attend", "decode", "decode_paged"]

_FOLD_LIMIT = 16  # queries
_PART = 1024  # keys that are worth a thread of their own


def decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """See `mla_decode`."""
    queries, keys = q.shape[1], states.shape[1]
    if not q.numel() or not keys:
        return q.new_zeros(*q.shape[:3], kv_lora_rank)
    if mask is None and queries > 1:
        mask = causal_mask(queries, keys, q.device)
    mask = as_dense(mask, keys)
    if states.dtype != torch.uint8:
        # The last R columns are the rotated keys' weighted sum, which nobody asked for.
        return attend(q, states, scale, mask)[..., :kv_lora_rank]
    kind = q.device.type
    # What follows is float32 on purpose; a meta device has no autocast.
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
    held = torch.arange(most, device=lengths.device) < lengths[:, None]  # [B, S]
    # Neither a page that is not there nor what a page holds beyond the row's length, NaN perhaps, may be read.
    wanted = torch.where(held[:, ::size], block_table, 0)
    states = pages[wanted].view(-1, most, width).masked_fill(~held[..., None], 0)
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
    """How many parts to cut the keys into, so that every CPU thread has some.

    PyTorch's CPU kernel shares out (row of the batch, head, block of queries); one row with one head and a block of
    queries leaves all threads but one idle. Its gradient and a mask are not worth the trouble: both come with more
    queries.
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
