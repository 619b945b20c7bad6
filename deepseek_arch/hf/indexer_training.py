"""Training of sparse attention's indexers through transformers: the stage, and the weight of their loss.

model.config.indexer_stage = "dense"                       # the warm-up, of a model with dense attention until then
da.train_only_indexers(model)                              # freezes everything else
Trainer(model, ...).train()
model.requires_grad_(True)
model.config.indexer_stage = "sparse"
Trainer(model, ...).train()
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..attention.key_selection import STAGES, KeySelection
from ..attention.lightning_indexer import LightningIndexer
from ..config.argument_types import shown

__all__ = ["carry_loss", "indexer_stage", "indexer_weight", "mean_recall"]


def indexer_stage(model: Any) -> str | None:
    """Returns the stage of the indexers' training: `indexer_stage` of the config, None where it has none.

    Raises:
        ValueError: it is no stage, or the model has no indexers that it could train.
    """
    stage = getattr(model.config, "indexer_stage", None)
    if stage is None:
        return None
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"expected indexer_stage None, 'dense' or 'sparse', got {shown(stage)}")
    if not any(isinstance(module, LightningIndexer) for module in model.modules()):
        raise ValueError(f"expected a model with indexers for indexer_stage {stage!r}, got none")
    return stage


def indexer_weight(model: Any) -> float:
    """Returns the weight of the indexers' loss, `indexer_loss_weight` of the config.

    Raises:
        ValueError: it is no number, not positive or not finite.
    """
    given = getattr(model.config, "indexer_loss_weight", 1.0)
    weight = float(given) if isinstance(given, int | float) and not isinstance(given, bool) else math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"expected a finite indexer_loss_weight > 0, got {shown(given)}")
    return weight


def mean_recall(selection: KeySelection) -> Tensor | None:
    """Returns the mean over layers of the recall, which the dense stage measures."""
    values = list(selection.recall.values())
    if not values:
        return None
    total = values[0].detach().clone()
    for value in values[1:]:
        total += value.detach().to(total.device)
    return total / len(values)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, counted: Tensor, loss: Tensor, alone: bool) -> Tensor:
        ctx.save_for_backward(counted)
        ctx.alone, ctx.kind, ctx.device = alone, loss.dtype, loss.device
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (counted,) = ctx.saved_tensors
        share = -grads[0].masked_fill(~counted, 0.0).sum(dtype=torch.float32)
        own = torch.zeros_like(grads[0]) if ctx.alone else grads[0]
        return own, None, share.to(ctx.device, ctx.kind), None


def carry_loss(log_probs: Tensor, counted: Tensor, loss: Tensor, alone: bool) -> Tensor:
    """Returns log-probabilities whose training trains on a loss too, which is a mean over the same call.

    TRL's SFTTrainer makes its loss of them, `-log_probs.sum() / targets of the step`, and reads no other. The loss
    counts by the share of the step's targets that this call has, and what is logged is without it.

    Args:
        log_probs: [B, T], of the targets, 0 elsewhere; counted: bool [B, T], True for the targets.
        loss: a scalar.
        alone: no gradient reaches the log-probabilities.
    """
    return _Carried.apply(log_probs, counted.to(log_probs.device), loss, alone)
