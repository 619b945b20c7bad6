"""Expert parallelism: tokens travel to the ranks of their experts, and weighted sums come back.

One row for each (token, rank) however many of its experts the rank holds: ids and weights of the choices travel with
it, and the rank returns their weighted sum, as DeepSeek's own kernels do. Notation: T tokens, E experts, K chosen, R
ranks, L = E / R experts of each, H hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_to_all, exchange

__all__ = ["Dispatch", "combine_rows", "dispatched", "plan_dispatch"]

DISPATCH, COMBINE, COUNTS = "expert dispatch", "expert combine", "expert counts"


class Dispatch(NamedTuple):
    """Ways of one batch's rows.

    Attributes:
        tokens: int64 [rows], token of each row that is sent, by rank, then token.
        places: int64 [T, min(K, R)], rows of each token in the order of ranks; `rows` where there is none.
        sent, received: rows to and from each rank.
        ids: int64 [received rows, K], this rank's experts of each row, L where another rank serves the choice.
        weights: float32 [rows, K] that are sent, 0 for choices of other ranks.
    """

    tokens: Tensor
    places: Tensor
    sent: list[int]
    received: list[int]
    ids: Tensor
    weights: Tensor


def plan_dispatch(
    ids: Tensor, weights: Tensor, num_experts: int, group: Any, way: str = "", parts: int = 1
) -> Dispatch:
    """Exchanges counts and ids, and returns the ways of the rows.

    Args:
        ids: int64 [T, K]; the value E marks a dropped choice, which no rank serves.
        weights: [T, K].
        group: its ranks hold L consecutive experts each.
        way: added to the purpose of the bytes.
        parts: neighbouring ranks of the group that hold a part each of the same experts: a row goes to each of them.
    """
    ranks = dist.get_world_size(group)
    owners = ranks // parts
    local = num_experts // owners
    owner = torch.where(ids < num_experts, ids // local, owners)  # [T, K]
    serves = torch.zeros(len(ids), owners + 1, dtype=torch.bool, device=ids.device).scatter_(1, owner, True)
    serves = serves[:, :owners].repeat_interleave(parts, 1)  # [T, R]
    rank, token = serves.T.nonzero(as_tuple=True)
    mine = owner[token] == (rank // parts)[:, None]  # [rows, K]
    sent = torch.bincount(rank, minlength=ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    came, went = received.tolist(), sent.tolist()
    there = torch.where(mine, ids[token] - (rank // parts)[:, None] * local, local)
    narrow = torch.int16 if local < 2**15 else torch.int32
    arrived = exchange(there.to(narrow), came, went, group, DISPATCH + way).long()
    places = token.new_full((len(ids), min(ids.shape[1], owners) * parts + 1), len(token))
    slot = (serves.long().cumsum(1) - 1)[token, rank]  # number of ranks before this one that serve the token
    places[token, slot] = torch.arange(len(token), device=ids.device)
    return Dispatch(token, places[:, :-1], went, came, arrived, torch.where(mine, weights[token], 0.0))


def combine_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Adds up the rows of each token, in the order of ranks, in float32 at least -> [T, H] in the rows' dtype.

    By gathers, so that neither the sums nor their gradients depend on the order in which atomics land (TRAPS C14).
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    padded = torch.cat((wide, wide.new_zeros(1, wide.shape[1])))
    total = padded[places[:, 0]]
    for place in places[:, 1:].unbind(1):
        total = total + padded[place]
    return total.to(rows.dtype)


def dispatched(
    experts: Any, x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: Any, way: str = "", parts: int = 1
) -> Tensor:
    """Computes the weighted sum of each token's experts, wherever they are, [T, H].

    Args:
        experts: function of rows [N, H], local ids [N, K] and weights [N, K]: this rank's experts.
        way, parts: as for `plan_dispatch`.
    """
    plan = plan_dispatch(ids, weights, num_experts, group, way, parts)
    rows = all_to_all(x[plan.tokens], plan.received, plan.sent, group, DISPATCH + way)
    row_weights = all_to_all(plan.weights, plan.received, plan.sent, group, DISPATCH + way)
    out = experts(rows, plan.ids, row_weights)
    return combine_rows(all_to_all(out, plan.sent, plan.received, group, COMBINE + way), plan.places)
