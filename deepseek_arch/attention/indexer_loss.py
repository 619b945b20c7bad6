"""The loss that trains the lightning indexer (V3.2 report, equations 3 and 4; TRAPS G6).

The attention of a query, summed over heads and divided by its sum, is a distribution p over keys; the softmax of the
indexer's scores is another. The loss is the KL divergence of the latter from p, over all keys that a query sees (the
dense warm-up) or over those that were selected (the sparse stage). p and the indexer's inputs are constants: the loss
trains the indexer alone, and nothing else trains the indexer.

Everything is computed for a block of queries at a time, and again in the backward pass, so that neither the attention
nor the scores of all queries and keys exist at once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepseek_kernels import topk_select
from deepseek_kernels.common.masks import visible_keys

from ..layers.rope import Rotation
from .key_selection import KeySelection
from .lightning_indexer import query_blocks

if TYPE_CHECKING:
    from .sparse_attention import SparseLatentAttention

__all__ = ["attention_mass", "indexer_loss"]

_TRIPLES = 2**25  # (query, key, head of the indexer) of a block: 128 MB of float32 in its backward pass


def indexer_loss(
    attention: SparseLatentAttention,
    x: Tensor,
    latents: Tensor,
    q: Tensor,
    rope: Rotation,
    index_keys: Tensor,
    states: tuple[Tensor, Tensor],
    mask: Tensor | None,
    ids: Tensor | None,
    selection: KeySelection,
) -> None:
    """Adds the loss of one layer to `selection`, and in the dense stage the recall of its selection.

    Args:
        x, latents, rope, index_keys, mask: as for `LightningIndexer.scores`.
        q: [B, T, N, P + R], the attention's own queries.
        states: the attention's latents [B, S, C] and rotated keys [B, S, R].
        ids: int32 [B, T, K], the selected keys; None for the loss over all keys.
    """
    indexer = attention.indexer
    assert indexer is not None
    batch, queries, keys = x.shape[0], x.shape[1], index_keys.shape[1]
    x, latents, q = x.detach(), latents.detach(), q.detach()
    with torch.no_grad():
        expanded = attention.expand(states[0])[..., : attention.qk_nope_head_dim]  # [B, S, N, P]
        rotated = states[1].detach()
    weight = torch.ones(batch, queries, device=x.device) if selection.valid is None else selection.valid.float()
    total, best, found = x.new_zeros((), dtype=torch.float32), [], []
    for part in query_blocks(mask, batch, queries, keys, _TRIPLES // indexer.num_heads):
        rows, stop = part.queries, part.keys
        chosen, states = None if ids is None else ids[:, rows], (expanded[:, :stop], rotated[:, :stop])
        operands = (x[:, rows], latents[:, rows], q[:, rows], *part.of_rope(rope), index_keys[:, :stop], *states)
        terms, scores, mass = checkpoint(_divergence, attention, part.mask, chosen, *operands, use_reentrant=False)
        total = total + (terms * weight[:, rows]).sum()
        if ids is None:
            best.append(_mass_of(mass, topk_select(mass.float(), indexer.top_k, part.mask)))
            found.append(_mass_of(mass, topk_select(scores.float(), indexer.top_k, part.mask)))
    selection.losses[attention.layer_idx] = total / weight.sum().clamp(min=1)
    if ids is None:
        ratio = torch.cat(found, dim=1) / torch.cat(best, dim=1).clamp(min=1e-30)
        selection.recall[attention.layer_idx] = (ratio * weight).sum() / weight.sum().clamp(min=1)


def _divergence(
    attention: SparseLatentAttention,
    mask: Tensor | None,
    ids: Tensor | None,
    x: Tensor,
    latents: Tensor,
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    expanded: Tensor,
    rotated: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the terms [B, t] of a block of queries, and as constants its scores and its mass, [B, t, S] each.

    Whatever is as large as queries times keys is made in here, so that no checkpoint of a block keeps it.
    """
    indexer, (batch, queries) = attention.indexer, x.shape[:2]
    assert indexer is not None
    if ids is None:
        seen = visible_keys(mask, 0, queries, queries, keys.shape[1], x.device).expand(batch, -1, -1)
    else:
        seen = _marks(ids, keys.shape[1])
    with torch.no_grad():
        mass = attention.mass(q, expanded, rotated, seen)
    scores = indexer.scores(x, latents, Rotation(cos, sin), keys, mask).masked_fill(~seen, -torch.inf)
    # A row without keys has no distribution, and no gradient.
    scores = torch.where(seen.any(-1, keepdim=True), scores, 0.0)
    logs = scores.log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.special.xlogy(mass, mass) - mass * logs).sum(-1), scores.detach(), mass


def attention_mass(q: Tensor, expanded: Tensor, rotated: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Returns the attention of each query, summed over heads and divided by its sum, float32 [B, t, S].

    Args:
        q: [B, t, N, P + R].
        expanded, rotated: [B, S, N, P] and [B, S, R], the keys of each head and those of all.
        seen: bool [B, t, S]. A query that sees nothing has no mass.
        scale: of the scores.
    """
    split, total = expanded.shape[-1], torch.zeros(seen.shape, dtype=torch.float32, device=q.device)
    nothing, kind = ~seen.any(-1, keepdim=True), q.device.type
    # Autocast would take the scores down to 16 bits; a meta device has none.
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        for head in range(q.shape[2]):
            own = q[:, :, head].float()
            scores = own[..., :split] @ expanded[:, :, head].float().mT + own[..., split:] @ rotated.float().mT
            total += (scores * scale).masked_fill(~seen, -torch.inf).masked_fill(nothing, 0.0).softmax(-1)
    return (total / q.shape[2]).masked_fill(~seen, 0.0)


def _marks(ids: Tensor, keys: int) -> Tensor:
    """Marks selected keys, bool [B, t, S]."""
    marks = torch.zeros(*ids.shape[:2], keys + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(-1, torch.where(ids < 0, keys, ids).long(), True)[..., :keys]


def _mass_of(mass: Tensor, ids: Tensor) -> Tensor:
    """Returns the mass on the keys `ids` of each query, [B, t]."""
    return mass.gather(-1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0.0).sum(-1)
