"""Outputs of the main model and of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..layers.rope import Rotation
from ..moe.routing_record import RoutingRecord

__all__ = ["CausalLMOutput", "LossCounts", "MTPStep", "Places", "TrunkOutput"]


class Places(NamedTuple):
    """Places of a pass's tokens, as layers need them; attributes as of `TrunkOutput`."""

    rope: Rotation
    mask: Tensor | None
    documents: Tensor | None


@dataclass
class TrunkOutput:
    """Output of the main model.

    Attributes:
        hidden_states: [B, T, H] after the final norm.
        pre_norm: [B, T, H] before it.
        rope, mask: the cosines and sines and the attention mask that the layers used, for modules that run on top.
        documents: [B, T] document numbers, or None where every row is one document.
        part: of a model whose sequences are cut over ranks, the tokens [B, T / n] that all of this but `documents` is
            of (`parallel.context_parallel.SequencePart`); else None.
    """

    hidden_states: Tensor
    pre_norm: Tensor
    rope: Rotation
    mask: Tensor | None
    documents: Tensor | None
    part: Any | None = None


@dataclass(frozen=True)
class MTPStep:
    """Inputs of one pass of an MTP module, as those of `DeepseekLM.mtp_forward`; no tuple, so that wrappers cast none.

    Attributes:
        hidden: [B, T, H].
        next_ids: int [B, T].
        depth: number of the module, from 0.
        rope, mask, cache: the main model's angles and mask for the same positions, and a cache from `new_mtp_cache`.
    """

    hidden: Tensor
    next_ids: Tensor
    depth: int
    rope: Rotation
    mask: Tensor | None = None
    cache: Any | None = None


class LossCounts(NamedTuple):
    """Numbers that the losses of a pass are means over.

    Attributes:
        targets: int64 [1 + D], targets of the next token, then of each MTP module.
        sequences: int64 [1 + D], rows with a token that the main model routes, then each MTP module.
    """

    targets: Tensor
    sequences: Tensor


@dataclass
class CausalLMOutput:
    """Output of the language model.

    Attributes:
        logits: [B, kept, vocab_size], or None with `return_logits=False`.
        loss: mean cross-entropy of the next token, float32 scalar, when labels were given; in training mode plus
            `aux_loss`. Losses are means over this call. Accumulated over calls they are those of one call with all rows
            if every call has as many targets; else weight each by its own number (targets for `loss` and, by depth, for
            `mtp_losses`; rows for `aux_loss`).
        aux_loss: in training mode, the sum over decoder layers of `DeepseekLM.balance_loss`, its factors included.
        mtp_loss: mean over depths of the cross-entropy of the tokens further ahead and, in training mode, of the MTP
            modules' balance losses; unweighted and not part of `loss`. Given when labels and input_ids were, no cache
            was, and the model has MTP modules. Train on `loss + weight * mtp_loss`; `mtp_loss.mtp_weight` is V3's
            schedule of the weight.
        mtp_losses, mtp_accuracy: float32 [D], by depth: its cross-entropy, and how often its best guess was right.
        mtp_aux_losses: float32 [D], in training mode, by depth: its balance loss, factors included.
        counts: numbers that these means are over, in training mode with labels.
        hidden_states: [B, T, H], the main model's output after the final norm.
        indexer_loss: sum over layers of `KeySelection.losses`, when a stage of the indexers' training was asked for; no
            part of `loss`.
        routing: every routing decision, with `record_routing`.
        trunk: output of the main model, with `return_trunk`.
    """

    logits: Tensor | None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    mtp_losses: Tensor | None = None
    mtp_accuracy: Tensor | None = None
    mtp_aux_losses: Tensor | None = None
    counts: LossCounts | None = None
    hidden_states: Tensor | None = None
    indexer_loss: Tensor | None = None
    routing: RoutingRecord | None = None
    trunk: TrunkOutput | None = None
