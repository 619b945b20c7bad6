"""Scores of the indexer in plain PyTorch, tile by tile.

A tile's products, one for each (query, head, key), stay in a processor's cache; all of them would be 64 times the
scores.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ...common.fp8 import decode
from ...common.masks import visible_keys
from ..packed_index_keys import split_index_keys

__all__ = ["scores"]

_TRIPLES = 2**20  # (query, head, key) of a tile, over all rows of the batch: 4 MB of float32
_ROWS = 4096  # (query, head) of a tile: enough for a product, few enough that tiles have many keys
_LEAST = 16  # keys of a tile, however many rows there are


def scores(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """See `indexer_scores`."""
    (batch, queries, heads, width), count = q.shape, keys.shape[1]
    scale = None
    if keys.dtype == torch.uint8:
        codes, scale = split_index_keys(keys, width)
        q, keys, scale = decode(q.contiguous()), decode(codes), scale[..., 0]  # [B, S]
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = keys.to(dtype).mT  # [B, D, S]
    if 0 in (batch, queries, count):
        return weights.new_zeros(batch, queries, count)
    if torch.compiler.is_exporting():  # sizes may be symbols, of which no tiles can be counted
        block = _tile(q.to(dtype), keys, weights)
        block = block if scale is None else block * scale[:, None]
        return block.masked_fill(~visible_keys(mask, 0, queries, queries, count, q.device), -torch.inf)
    rows = max(1, min(queries, _ROWS // max(1, batch * heads)))
    columns = max(_LEAST, _TRIPLES // max(1, batch * rows * heads))
    kind, blocks = q.device.type, []
    # Autocast would take the products down to 16 bits; a meta device has none.
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        for first in range(0, queries, rows):
            last = min(first + rows, queries)
            part, weight = q[:, first:last].to(dtype), weights[:, first:last]
            # Of plain causal attention, no key behind the block's last query is seen.
            end = count if mask is not None else max(0, min(count, last + count - queries))
            tiles = [
                _tile(part, keys[..., start : min(start + columns, end)], weight) for start in range(0, end, columns)
            ]
            block = torch.cat(tiles, dim=-1) if tiles else weight.new_zeros(batch, last - first, 0)
            if scale is not None:
                block = block * scale[:, None, :end]
            seen = visible_keys(mask, first, last, queries, count, q.device)
            block = torch.nn.functional.pad(block, (0, count - end))
            blocks.append(block.masked_fill(~seen, -torch.inf))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def _tile(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Scores of q [B, t, G, D] and keys [B, D, s] -> [B, t, s]."""
    products = (q.flatten(1, 2) @ keys).relu()  # [B, t G, s]
    products = products.view(*q.shape[:3], keys.shape[-1])
    return (weights[:, :, None] @ products)[:, :, 0]
