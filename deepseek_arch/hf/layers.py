"""Decoder layers and MTP modules that transformers can recompute in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention.key_selection import KeySelection
from ..config.deepseek_config import DeepseekConfig
from ..layers.rope import Rotation
from ..models.main_model import DecoderLayer
from ..models.mtp_layer import MTPLayer
from ..moe.routing import Routing
from .attention import DeepseekAttention, DeepseekSparseAttention, ShowsWeights
from .configuration import as_arch_config

__all__ = ["DeepseekDecoderLayer", "DeepseekMTPLayer"]


class DeepseekDecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """The core's decoder layer under the argument names that transformers' checkpointing looks for."""

    attention_class = DeepseekAttention
    sparse_attention_class = DeepseekSparseAttention

    def __init__(self, config: PreTrainedConfig, layer_idx: int, core: DeepseekConfig | None = None) -> None:
        DecoderLayer.__init__(self, core or as_arch_config(config).to_core(), layer_idx)
        assert isinstance(self.self_attn, ShowsWeights)
        self.self_attn.config = config

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        rope: Rotation,
        mask: Tensor | None = None,
        past_key_values: Any | None = None,
        routing: Routing | None = None,
        selection: KeySelection | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Maps [B, T, H] to the same shape; see `DecoderLayer.forward`.

        Where `routing` keeps logits or a balance loss, they are returned beside it (`Routing.differentiable`).
        """
        out = DecoderLayer.forward(self, hidden_states, rope, mask, past_key_values, routing, selection)
        kept = () if routing is None else routing.differentiable(self.layer_idx)
        return (out, *kept) if kept else out


class DeepseekMTPLayer(GradientCheckpointingLayer, MTPLayer):
    """The core's MTP module, under transformers' checkpointing."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        next_embeddings: Tensor,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: Any | None = None,
        routing: Routing | None = None,
        selection: KeySelection | None = None,
    ) -> tuple[Tensor, ...]:
        """As `MTPLayer.forward`, and returns what `routing` kept beside the rest, as the decoder layers do."""
        out = MTPLayer.forward(self, hidden, next_embeddings, rope, mask, cache, routing, selection)
        return out if routing is None else (*out, *routing.differentiable(self.layer_idx))
