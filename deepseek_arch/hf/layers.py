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
from ..models.side_results import SideResults
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
    ) -> Tensor | tuple[Any, ...]:
        """Maps [B, T, H] to the same shape; see `DecoderLayer.forward`.

        Where the pass has `routing`, or a selection of keys in training, the output is a tuple: behind it the layer's
        `SideResults`, and the tensors of these that are differentiated (`Routing.differentiable`).
        """
        if routing is None and (selection is None or not self.training):
            return DecoderLayer.forward(self, hidden_states, rope, mask, past_key_values, None, selection)
        side = SideResults(routing, selection)
        out = DecoderLayer.forward(self, hidden_states, rope, mask, past_key_values, side.routing, side.selection)
        return (out, side, *side.differentiable(self.layer_idx))


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
    ) -> tuple[Any, ...]:
        """As `MTPLayer.forward`; side results are returned behind the rest, as by the decoder layers."""
        if routing is None and (selection is None or not self.training):
            return MTPLayer.forward(self, hidden, next_embeddings, rope, mask, cache, None, selection)
        side = SideResults(routing, selection)
        out = MTPLayer.forward(self, hidden, next_embeddings, rope, mask, cache, side.routing, side.selection)
        return (*out, side, *side.differentiable(self.layer_idx))
