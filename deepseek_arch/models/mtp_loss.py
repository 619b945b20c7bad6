"""Multi-token prediction (V3 report, section 2.2): one more decoder layer that predicts one token further.

h'_i = eh_proj([enorm(Emb(t_{i+k})); hnorm(h_i)])        (equation 21, but with the embedding first: the stored
                                                          weights take it that way, TRAPS F1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.routing import Routing
from .losses import IGNORE, head_losses, ignore
from .outputs import LossCounts

__all__ = ["count_targets", "mtp_losses", "mtp_weight", "shift_labels", "shift_left"]


def mtp_losses(
    run: Callable[[Tensor, Tensor, int, Routing | None], tuple[Tensor, Tensor]],
    depths: int,
    head: nn.Module,
    hidden: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    *,
    padding: Tensor | None = None,
    documents: Tensor | None = None,
    routing: Routing | None = None,
    detached: bool = False,
    part: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes, by depth, the cross-entropy `depth + 2` tokens ahead (equation 24) and the share of right guesses.

    Each depth averages over its own number of targets. Positions whose target lies behind the end of their row or
    document do not count; being last, no position that counts attends to them (TRAPS F8).

    Args:
        run: hidden [B, T, H], the ids [B, T] of the tokens `depth + 1` ahead, the depth, its router's settings -> the
            hidden state for the next depth, and the head's input.
        depths: D.
        head: the main model's.
        hidden: [B, T, H], input of the first depth.
        input_ids, labels: int [B, T], the tokens themselves; labels are -100 where ignored.
        padding: bool [B, T], or None where there is no padding.
        documents: [B, T] document numbers, or None where every row is one document.
        detached: treats the main model and the head as constants.
        part: of sequences cut over ranks, the tokens of `hidden` (`TrunkOutput.part`), which `run` is given; the other
            arguments are of whole sequences.

    Returns:
        losses and accuracies, float32 [D] each.
    """
    hidden, states, targets = hidden.detach() if detached else hidden, [], []
    real = torch.ones_like(input_ids) if padding is None else (~padding).long()
    own = (lambda x: x) if part is None else part.cut
    for depth in range(depths):
        next_ids = own(shift_left(input_ids, depth + 1))
        # The last positions have no token of their own to embed: their routing does not count (TRAPS D3).
        counted = shift_labels(real, depth + 1, documents, ignore=0) != 0
        restricted = None if routing is None else routing.restricted_to(own(counted))
        hidden, normed = run(hidden, next_ids, depth, restricted)
        states.append(normed)
        targets.append(own(ignore(shift_labels(labels, depth + 2, documents), padding)))
    return head_losses(head, states, targets, detached=detached, part=part)


def count_targets(
    labels: Tensor, padding: Tensor | None = None, documents: Tensor | None = None, depths: int = 0
) -> LossCounts:
    """Counts what the losses of a pass are means over; arguments as those of `mtp_losses`."""
    real = torch.ones_like(labels) if padding is None else (~padding).long()
    targets, rows = [], []
    for depth in range(-1, depths):  # -1 for the main model
        ahead = ignore(shift_labels(labels, depth + 2, documents), padding)
        routed = shift_labels(real, depth + 1, documents, ignore=0) != 0
        targets.append((ahead != IGNORE).sum())
        rows.append(routed.any(-1).sum())
    return LossCounts(torch.stack(targets), torch.stack(rows))


def mtp_weight(tokens: float, first: float = 0.3, later: float = 0.1, change: float = 10e12) -> float:
    """Returns lambda, the weight of `mtp_loss` after so many tokens of training: V3's is 0.3 for 10T, then 0.1."""
    return first if tokens < change else later


def shift_left(x: Tensor, by: int, fill: int = 0) -> Tensor:
    """Shifts the columns of [B, T] to the left by `by`, filling the last ones with `fill`."""
    shifted = torch.full_like(x, fill)
    if by < x.shape[1]:
        shifted[:, : x.shape[1] - by] = x[:, by:]
    return shifted


def shift_labels(labels: Tensor, by: int, documents: Tensor | None = None, ignore: int = -100) -> Tensor:
    """Returns the label `by` tokens ahead, ignored where it lies behind the end of the row or of the token's document.

    Args:
        labels: [B, T].
        documents: [B, T] document numbers, or None for one document a row.
    """
    shifted = shift_left(labels, by, ignore)
    if documents is None:
        return shifted
    return shifted.masked_fill(shift_left(documents, by, -1) != documents, ignore)
