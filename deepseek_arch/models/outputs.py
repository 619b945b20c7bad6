"""Outputs of the main model and of the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..moe.routing_record import RoutingRecord

__all__ = ["CausalLMOutput", "TrunkOutput"]


@dataclass
class TrunkOutput:
    """Output of the main model.

    Attributes:
        hidden_states: [B, T, H] after the final norm.
        pre_norm: [B, T, H] before it.
        rope, mask: the cosines and sines and the attention mask that the layers used, for modules that run on top.
        documents: [B, T] document numbers, or None where every row is one document.
    """

    hidden_states: Tensor
    pre_norm: Tensor
    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    documents: Tensor | None


@dataclass
class CausalLMOutput:
    """Output of the language model.

    Attributes:
        logits: [B, kept, vocab_size], or None with `return_logits=False`.
        loss: mean cross-entropy of the next token, float32 scalar, when labels were given; in training mode plus
            `aux_loss`. Losses are means over this call. Accumulated over calls they are those of one call with all rows
            if every call has as many targets; else weight each by its own number (targets for `loss` and, by depth, for
            `mtp_losses`; rows for `aux_loss`).
        aux_loss: in training mode, the sum over layers of `DeepseekLM.balance_loss`, its factors included.
        mtp_loss: mean over depths of the cross-entropy of the tokens further ahead, unweighted and not part of `loss`,
            when labels and input_ids were given, no cache was, and the model has MTP modules. Train on
            `loss + weight * mtp_loss`; `mtp_loss.mtp_weight` is V3's schedule of the weight.
        mtp_losses, mtp_accuracy: float32 [D], by depth: its loss, and how often its best guess was right.
        hidden_states: [B, T, H], the main model's output after the final norm.
        indexer_loss: sum over layers of `KeySelection.losses`, when a stage of the indexers' training was asked for; no
            part of `loss`.
        routing: every routing decision, with `record_routing`.
    """

    logits: Tensor | None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    mtp_losses: Tensor | None = None
    mtp_accuracy: Tensor | None = None
    hidden_states: Tensor | None = None
    indexer_loss: Tensor | None = None
    routing: RoutingRecord | None = None
