"""Training the prediction layers through transformers: `config.mtp_loss_weight`, and what a step needs for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from ..models.mtp_chain import mtp_chain_losses
from ..models.mtp_layer import MTPLayer
from ..models.outputs import TrunkOutput
from ..moe.balance_loss import BalanceLoss
from ..moe.routing import Routing
from ..moe.routing_record import RoutingRecord

__all__ = [
    "DeepseekCausalLMOutput",
    "DeepseekMTPLayer",
    "DeepseekModelOutput",
    "loss_weight",
    "prediction_losses",
    "share_of_items",
]


class DeepseekMTPLayer(GradientCheckpointingLayer, MTPLayer):
    """The core's prediction layer, which transformers' checkpointing knows."""


@dataclass
class DeepseekModelOutput(MoeModelOutputWithPast):
    """The trunk's output.

    Attributes:
        trunk: what prediction layers on top read, when `return_trunk` was asked for.
        routing: every routing decision, when `record_routing` was asked for.
    """

    trunk: TrunkOutput | None = None
    routing: RoutingRecord | None = None


@dataclass
class DeepseekCausalLMOutput(MoeCausalLMOutputWithPast):
    """The language model's output.

    Attributes:
        mtp_loss: mean over depths of the cross-entropy of the tokens further ahead, unweighted, where
            `config.mtp_loss_weight` and labels ask for it.
        mtp_losses, mtp_accuracy: float32 [D], by depth: its loss, and how often its best guess was right.
        routing: every routing decision of the trunk, when `record_routing` was asked for.
    """

    mtp_loss: Tensor | None = None
    mtp_losses: Tensor | None = None
    mtp_accuracy: Tensor | None = None
    routing: RoutingRecord | None = None


def loss_weight(model: Any) -> float:
    """The weight of the prediction layers' loss: `mtp_loss_weight` of the config, 0 where it has none.

    Raises:
        ValueError: it is negative, or the model has no prediction layers that it could weigh.
    """
    weight = float(getattr(model.config, "mtp_loss_weight", None) or 0.0)
    if not weight >= 0:
        raise ValueError(f"expected mtp_loss_weight >= 0, got {weight}")
    if weight and not len(model.mtp):
        raise ValueError(f"expected a model with prediction layers for mtp_loss_weight {weight}, got one without any")
    return weight


def share_of_items(
    labels: Tensor, num_items: Tensor | int | None, shift_labels: Tensor | None = None
) -> Tensor | float:
    """The part of an optimizer step's targets that is in this call: what means over this call weigh in the step.

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
    model: Any, trunk: TrunkOutput, input_ids: Tensor, labels: Tensor, valid: Tensor | None, balanced: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses and accuracies of a `DeepseekForCausalLM`'s prediction layers, as `DeepseekLM` computes them.

    Their routers count for `LoadBalancer` as the trunk's do.

    Args:
        trunk: of the pass over the same tokens.
        input_ids, labels: [B, T].
        valid: bool [B, T], False for padding; None where nothing is.
        balanced: whether to compute their balance loss, which training adds to the trunk's.

    Returns:
        losses and accuracies float32 [D], and the balance loss without its factor, or None.
    """
    config = model.config.to_core()
    loss = replace(BalanceLoss.from_config(config), sequence=1.0) if balanced else None
    routing = Routing(tuple(input_ids.shape), valid, loss=loss) if model.training else None
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
    )
    if routing is not None:
        routing.commit()
    return losses, accuracy, None if routing is None else routing.total_loss()
