"""Outputs of the model classes: transformers' own, and what multi-token prediction and routing records add."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from ..attention.key_selection import KeySelection
from ..models.outputs import TrunkOutput
from ..moe.routing_record import RoutingRecord

__all__ = ["DeepseekCausalLMOutput", "DeepseekModelOutput"]


@dataclass
class DeepseekModelOutput(MoeModelOutputWithPast):
    """Output of the main model.

    Attributes:
        trunk: inputs of the MTP modules, when `return_trunk` was asked for.
        selection: losses of the indexers, when `indexer_stage` was asked for.
        routing: every routing decision, when `record_routing` was asked for.
    """

    trunk: TrunkOutput | None = None
    selection: KeySelection | None = None
    routing: RoutingRecord | None = None


@dataclass
class DeepseekCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of the language model.

    Attributes:
        mtp_loss: mean over depths of the cross-entropy of the tokens further ahead, unweighted, where
            `config.mtp_loss_weight` and labels ask for it; with router logits, their balance loss is added.
        mtp_losses, mtp_accuracy: float32 [D], by depth: the loss, and the share of right guesses.
        indexer_loss: sum over layers of the indexers' loss, unweighted, where `config.indexer_stage` and labels ask for
            it; indexer_recall: in the dense stage, the mean over layers of `KeySelection.recall`.
        routing: every routing decision of the main model, when `record_routing` was asked for.
    """

    mtp_loss: Tensor | None = None
    mtp_losses: Tensor | None = None
    mtp_accuracy: Tensor | None = None
    indexer_loss: Tensor | None = None
    indexer_recall: Tensor | None = None
    routing: RoutingRecord | None = None
