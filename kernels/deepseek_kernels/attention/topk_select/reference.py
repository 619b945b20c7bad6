"""The selection in plain PyTorch, for a block of queries at a time.

`torch.topk` leaves the choice among equal scores to the device, so only the K-th best score is taken from it: greater
ones are selected, and of those equal to it the first ones that there is room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.masks import visible_keys

__all__ = ["select"]

_SCORES = 2**22  # of a block of queries, over all rows of the batch


def select(scores: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """See `topk_select`."""
    batch, queries, keys = scores.shape
    if torch.compiler.is_exporting():  # sizes may be symbols, with which no branch and no loop is decided
        return _compacted(_chosen(scores, top_k, visible_keys(mask, 0, queries, queries, keys, scores.device)), top_k)
    top_k = min(top_k, keys)
    if 0 in (batch, queries, keys):
        return torch.empty(batch, queries, top_k, dtype=torch.int32, device=scores.device)
    rows, blocks = max(1, _SCORES // (batch * keys)), []
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        seen = visible_keys(mask, first, last, queries, keys, scores.device)
        blocks.append(_compacted(_chosen(scores[:, first:last], top_k, seen), top_k))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def _chosen(scores: Tensor, top_k: int, seen: Tensor) -> Tensor:
    """Marks the selected keys, bool [B, t, S], of which at most `top_k` in a row."""
    scores = scores.masked_fill(scores.isnan(), torch.inf).masked_fill(~seen, -torch.inf)
    # An exported program may have fewer than `top_k` keys: with keys that have no score it always has enough.
    enough = F.pad(scores, (0, top_k), value=-torch.inf) if torch.compiler.is_exporting() else scores
    least = enough.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    greater, equal = scores > least, (scores == least) & seen
    room = top_k - greater.sum(-1, keepdim=True, dtype=torch.int32)
    return greater | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def _compacted(chosen: Tensor, top_k: int) -> Tensor:
    """Returns the indices of the marks of [B, t, S], int32 [B, t, K], in rising order, then -1."""
    places = chosen.cumsum(-1, dtype=torch.int32) - 1
    places = torch.where(chosen, places, top_k).long()  # others go to one column more, which is cut off
    index = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand(chosen.shape)
    out = torch.full((*chosen.shape[:2], top_k + 1), -1, dtype=torch.int32, device=chosen.device)
    return out.scatter_(-1, places, index)[..., :top_k]
