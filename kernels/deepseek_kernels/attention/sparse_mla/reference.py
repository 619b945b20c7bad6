"""Sparse attention as dense attention of single queries: `mla_decode` on the keys of each, gathered for a block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..mla_decode import mla_decode

__all__ = ["attend"]

_BYTES = 2**25  # of the keys that are gathered at a time: 14 queries of V3.2 in bfloat16


def attend(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    """See `sparse_mla`."""
    batch, queries, _, _ = q.shape
    chosen = ids.shape[2]
    if 0 in q.shape or not chosen or not states.shape[1]:
        return q.new_zeros(*q.shape[:3], kv_lora_rank)
    if torch.compiler.is_exporting():  # sizes may be symbols, of which no blocks can be counted
        return _attend_block(q, states, ids, kv_lora_rank, scale)
    rows = max(1, _BYTES // max(1, batch * chosen * states.shape[2] * states.element_size()))
    differentiated = torch.is_grad_enabled() and (q.requires_grad or states.requires_grad)
    blocks = []
    for first in range(0, queries, rows):
        part = slice(first, first + rows)
        operands = (q[:, part], states, ids[:, part], kv_lora_rank, scale)
        if differentiated and rows < queries:
            blocks.append(checkpoint(_attend_block, *operands, use_reentrant=False))
        else:
            blocks.append(_attend_block(*operands))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def _attend_block(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    """Attention of a block of queries, each a row of a batch with one query."""
    batch, queries, heads, width = q.shape
    chosen = (ids >= 0).sum(-1, dtype=torch.int32).flatten()  # [B t]
    # A place behind the last index repeats the first one: no token is read that the query has not selected.
    places = torch.where(ids < 0, ids[..., :1], ids).clamp(min=0).long()
    if batch == 1:
        gathered = states[0].index_select(0, places.flatten())
    else:
        rows = torch.arange(batch, device=states.device)[:, None, None]
        gathered = states[rows, places]
    gathered = gathered.view(batch * queries, ids.shape[2], states.shape[2])
    spans = torch.stack((torch.zeros_like(chosen), chosen), dim=-1)[:, None]  # [B t, 1, 2]
    one = q.reshape(batch * queries, 1, heads, width)
    # All keys of all queries without a mask, where that can be seen without waiting for a device.
    eager = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    mask = None if eager and bool((ids[..., -1] >= 0).all()) else spans
    out = mla_decode(one, gathered, kv_lora_rank, scale, mask).view(batch, queries, heads, kv_lora_rank)
    if mask is None:
        return out
    return out.masked_fill((chosen == 0).view(batch, queries, 1, 1), 0)  # NaN in a token that nobody selected
