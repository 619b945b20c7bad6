"""transformers' model classes around the same blocks as `DeepseekLM`.

The containers are thin: embedding, layers, norm and head are the core's modules, and so is every number computed.
What is added is what transformers asks of a model: its caches and masks, recorded outputs, gradient checkpointing per
layer, attention weights under `attn_implementation="eager"`, and a load that fails rather than leaving weights random.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GradientCheckpointingLayer,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..attention.masking import document_numbers
from ..config.deepseek_config import DeepseekConfig
from ..layers.norm import RMSNorm
from ..layers.rope import RotaryEmbedding
from ..models.decoder_layer import DecoderLayer
from ..models.outputs import TrunkOutput
from ..moe.moe import Experts, Router
from ..moe.routing import Routing
from ..moe.routing_record import RoutingRecord
from ..quant.fp8_base import FP8Layer
from ..quant.fp8_convert import fp8_layers
from ..quant.fp8_experts import FP8Experts
from .attention import AttentionWeights, DeepseekAttention
from .attention_mask import FirstTokens, attention_mask_for, document_starts, real_tokens
from .configuration import ArchDeepseekV3Config, as_arch_config
from .key_mapping import register_conversions, saving_conversions
from .mtp_training import (
    DeepseekModelOutput,
)
from .state_dict_hooks import accept_published_names
from .strict_loading import StrictLoading

__all__ = ["DeepseekModel", "DeepseekPreTrainedModel"]


logger = logging.getLogger(__name__)


class DeepseekDecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """The core's decoder layer under the argument names that transformers' checkpointing looks for."""

    attention_class = DeepseekAttention

    def __init__(self, config: PreTrainedConfig, layer_idx: int, core: DeepseekConfig | None = None) -> None:
        DecoderLayer.__init__(self, core or as_arch_config(config).to_core(), layer_idx)
        self.self_attn.config = config

    def forward(
        self,
        hidden_states: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past_key_values: Any | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """[B, T, H] -> the same; see `DecoderLayer.forward`."""
        return DecoderLayer.forward(self, hidden_states, rope, mask, past_key_values, routing)


class DeepseekPreTrainedModel(StrictLoading, PreTrainedModel):
    """What the model classes share.

    `from_pretrained` reads published folders (BF16 or FP8, which stays FP8 unless asked otherwise), folders that
    transformers saved, and `save_pretrained` writes the published names, FP8 weights byte for byte. No registration is
    needed for these classes themselves.
    """

    config_class = ArchDeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekDecoderLayer", "DeepseekMTPLayer"]  # noqa: RUF012  transformers reads a list
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekDecoderLayer,
        "attentions": OutputRecorder(AttentionWeights, index=0),
        "router_logits": OutputRecorder(Router, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        super().__init__(as_arch_config(config))

    def _init_weights(self, module: nn.Module) -> None:
        # Only through transformers' functions, which leave alone what has been loaded.
        if isinstance(module, FP8Layer):
            return  # codes are never drawn
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`: a folder in the published layout."""
        quantized = fp8_layers(self) or getattr(self, "hf_quantizer", None) is not None
        if getattr(self.config, "quantization_config", None) is not None and not quantized:
            # From the config of a quantized checkpoint, of which this model has only the shape (TRAPS E12).
            del self.config.quantization_config
        self.set_saving_conversions()
        super().save_pretrained(save_directory, *args, **kwargs)

    # transformers refuses both for any quantized model; our FP8 layers stay what they are while the rest is cast.
    def half(self, *args: Any) -> Any:
        return self.to(torch.float16) if fp8_layers(self) else super().half(*args)

    def float(self, *args: Any) -> Any:
        return self.to(torch.float32) if fp8_layers(self) else super().float(*args)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Turns FP8 layers into ordinary ones, in `dtype` (default the model's), which adapters can be merged into."""
        return super().dequantize(dtype or self.dtype)

    def post_init(self) -> None:
        """What transformers does once a model's modules are there, and ours to read and write published names."""
        super().post_init()
        self.set_saving_conversions()
        accept_published_names(self)

    def set_saving_conversions(self) -> None:
        """Fixes what `save_pretrained` undoes, however the model was made."""
        self._weight_conversions = saving_conversions(self._core_for_saving(), self._has_fp8_experts())

    def _core_for_saving(self) -> DeepseekConfig | None:
        """The config of a model with prediction layers."""
        return None

    def _has_fp8_experts(self) -> bool:
        return any(isinstance(module, FP8Experts) for module in self.modules())


class DeepseekModel(DeepseekPreTrainedModel):
    """The trunk: token ids to final hidden states.

    Args:
        config: one of our configs, transformers' own for the same family, or a `DeepseekConfig`.

    Raises:
        UnsupportedModelError: a model that cannot be built (sparse attention).
    """

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        super().__init__(config)
        core = self.config.to_core()
        self.padding_idx = self.config.pad_token_id
        self.vocab_size = core.vocab_size
        self.embed_tokens = nn.Embedding(core.vocab_size, core.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(self.config, i, core) for i in range(core.num_hidden_layers))
        self.norm = RMSNorm(core.hidden_size, core.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding.from_config(core)
        self.replayed_routing: RoutingRecord | None = None  # see `replaying`
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_trunk: bool = False,
        record_routing: bool = False,
        replay_routing: RoutingRecord | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekModelOutput:
        """One forward pass.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T], zero for padding, or a finished mask [B, 1, T, S].
            position_ids: [B, T]; positions that start again within a row mark packed sequences, which never see each
                other, with a mask and with a cache too.
            past_key_values: any cache of transformers; it holds latents and rotated keys.
            inputs_embeds: [B, T, H] instead of input_ids.
            return_trunk: whether to return what prediction layers read as well.
            record_routing: whether to return every routing decision as `routing`.
            replay_routing: decisions to take instead of the routers' own, for all B x T tokens; weights are still the
                routers', and differentiable. Default: those of `replaying`, if any.
            kwargs: `cu_seq_lens_q` and `seq_idx` mark packed sequences as well; `output_hidden_states`,
                `output_router_logits`, and `output_attentions` (with `attn_implementation="eager"`).

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, or attention weights without "eager".
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                'expected attn_implementation="eager" with output_attentions, got '
                f"{self.config._attn_implementation!r}, which computes no weights"
            )
        if not getattr(self.config, "is_causal", True):
            raise ValueError("expected causal attention, got is_causal=False")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = x.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        starts = document_starts(batch, tokens, past, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
        mask = attention_mask_for(self.config, x, attention_mask, position_ids, past_key_values, starts)
        valid = real_tokens(attention_mask, tokens)
        documents = None
        if return_trunk:
            documents = document_numbers(position_ids, valid) if starts is None else starts
        if position_ids is None:
            position_ids = (torch.arange(tokens, device=x.device) + past)[None]
            if starts is not None:
                position_ids = position_ids - starts.to(x.device)
        cache: Any = past_key_values
        if mask is None and cache is not None and tokens > 1 and cache.get_mask_sizes(tokens, 0)[0] > tokens:
            cache = FirstTokens(cache, tokens)
        rope = self.rotary_emb(position_ids)
        # Counts for `LoadBalancer`: padding is left out where the mask says what is padding.
        replay = self.replayed_routing if replay_routing is None else replay_routing
        routing = None
        if self.training or record_routing or replay is not None:
            routing = Routing((batch, tokens), valid, record=record_routing, replay=replay)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, rope, mask=mask, past_key_values=cache, routing=routing)
        if routing is not None:
            routing.commit()
        hidden = self.norm(x)
        trunk = TrunkOutput(hidden, x, rope, mask, documents) if return_trunk else None
        record = None if routing is None else routing.record
        return DeepseekModelOutput(
            last_hidden_state=hidden, past_key_values=past_key_values, trunk=trunk, routing=record
        )


register_conversions(DeepseekModel.__name__)
