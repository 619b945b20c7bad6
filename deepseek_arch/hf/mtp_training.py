"""Training of the MTP modules through transformers: the weight of their loss, and the loss of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..attention.key_selection import KeySelection
from ..config.argument_types import shown
from ..models.mtp_chain import mtp_chain_losses
from ..models.outputs import TrunkOutput
from ..moe.balance_loss import BalanceLoss
from ..moe.routing import Routing
from .configuration import core_config

__all__ = ["loss_weight", "prediction_losses", "share_of_items"]


def loss_weight(model: Any) -> float:
    """Returns the weight of the MTP modules' loss: `mtp_loss_weight` of the config, 0 where it has none.

    Raises:
        ValueError: it is no number, negative or not finite, or the model has no MTP modules that it could weigh.
    """
    given = getattr(model.config, "mtp_loss_weight", None) or 0.0
    weight = float(given) if isinstance(given, int | float) else math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"expected a finite mtp_loss_weight >= 0, got {shown(given if math.isnan(weight) else weight)}"
        )
    if weight and not len(model.mtp):
        raise ValueError(f"expected a model with MTP modules for mtp_loss_weight {weight}, got one without any")
    return weight


def share_of_items(
    labels: Tensor, num_items: Tensor | int | None, shift_labels: Tensor | None = None
) -> Tensor | float:
    """Returns the share of an optimizer step's targets that is in this call: the weight of means over this call.

    transformers' trainers divide the summed cross-entropy by `num_items_in_batch`, the targets of all the batches that
    are accumulated, and nothing by their number. A loss that is a mean over each batch would count once for each of
    them instead of once a step (TRAPS D7).

    Args:
        labels: int64 [B, T].
        num_items: `num_items_in_batch`; None where the step is this call alone, or is averaged by the trainer.
        shift_labels: the targets themselves, where a trainer passes them.
    """
    if num_items is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != -100).sum() / num_items


def prediction_losses(
    model: Any,
    trunk: TrunkOutput,
    input_ids: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    balanced: bool,
    selection: KeySelection | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the losses and accuracies of a `DeepseekForCausalLM`'s MTP modules, as `DeepseekLM` computes them.

    Their routers count for `LoadBalancer` as the main model's do.

    Args:
        trunk: the main model's output for the same tokens.
        input_ids, labels: [B, T].
        valid: bool [B, T], False for padding; None where nothing is.
        balanced: computes their balance loss too.
        selection: the main model's, where indexers are trained; it gets the losses of the modules' own.

    Returns:
        losses and accuracies float32 [D], and the mean of the balance losses without their factor, or None.
    """
    config = core_config(model.config)
    loss = replace(BalanceLoss.from_config(config), sequence=1.0) if balanced else None
    routing = Routing((input_ids.shape[0], input_ids.shape[1]), valid, loss=loss) if model.training else None
    losses, accuracy = mtp_chain_losses(
        model.mtp,
        config,
        model.model.embed_tokens,
        model.lm_head,
        trunk,
        input_ids,
        labels if valid is None else labels.masked_fill(~valid, -100),
        padding=None if valid is None else ~valid,
        routing=routing,
        detached=model.mtp_detached,
        selection=selection,
    )
    if routing is not None:
        routing.commit()
    first = config.num_hidden_layers
    total = None if routing is None else routing.total_loss(range(first, first + len(model.mtp)))
    return losses, accuracy, None if total is None else total / len(model.mtp)
