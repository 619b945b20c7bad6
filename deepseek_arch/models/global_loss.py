"""Loss of a step over several data-parallel ranks, as one process would compute it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.argument_types import check_types
from .outputs import CausalLMOutput

__all__ = ["LossShares", "global_loss", "weighted_loss"]


class LossShares(NamedTuple):
    """Parts that the losses of one call have in those of all calls and ranks.

    Attributes:
        targets: [1 + D], of the cross-entropy of the next token, then of each MTP module.
        sequences: [1 + D], of the balance losses, likewise.
    """

    targets: Tensor
    sequences: Tensor


@check_types
def global_loss(out: CausalLMOutput, mtp_weight: float = 0.0, group: Any | None = None) -> Tensor:
    """Returns this rank's share of the loss of all ranks: the mean over ranks is the loss of one process.

    Ranks have different numbers of targets, and a mean of their means weighs targets differently. Here each mean is
    weighted by the number that it is over (targets, or sequences for balance losses), relative to the average rank's.
    Data-parallel wrappers (FSDP, DDP) average gradients over ranks, and so make those of one process.

    Args:
        out: of a pass in training mode with labels.
        mtp_weight: of `mtp_loss`; see `mtp_loss.mtp_weight`.
        group: of the ranks that see different tokens; None for the default one. Every one of them calls this.

    Returns:
        A float32 scalar. On one process, or without a process group, `out.loss + mtp_weight * out.mtp_loss`.

    Raises:
        ValueError: the pass had no labels or was not in training mode, or there is no `mtp_loss` to weigh.
    """
    if out.loss is None or out.counts is None:
        raise ValueError("expected the output of a pass in training mode with labels, got one without its loss")
    if mtp_weight and out.mtp_losses is None:
        raise ValueError(f"expected MTP modules for mtp_weight {mtp_weight}, got an output without mtp_losses")
    counts = torch.stack(out.counts)  # [2, 1 + D]
    shares = torch.ones_like(counts, dtype=torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = counts.clone()
        torch.distributed.all_reduce(total, group=group)
        shares = (counts * torch.distributed.get_world_size(group) / total.clamp(min=1)).float()
    return weighted_loss(out, LossShares(*shares), mtp_weight)


def weighted_loss(out: CausalLMOutput, shares: LossShares, mtp_weight: float) -> Tensor:
    """Returns `out.loss + mtp_weight * out.mtp_loss`, float32, each of their parts times its share."""
    assert out.loss is not None
    targets, sequences = torch.stack(tuple(shares)).to(out.loss.device)
    loss = out.loss if out.aux_loss is None else out.loss - out.aux_loss
    loss = targets[0] * loss
    if out.aux_loss is not None:
        loss = loss + sequences[0] * out.aux_loss
    if mtp_weight and out.mtp_losses is not None:
        ahead = targets[1:] * out.mtp_losses
        if out.mtp_aux_losses is not None:
            ahead = ahead + sequences[1:] * out.mtp_aux_losses
        loss = loss + mtp_weight * ahead.mean()
    return loss
