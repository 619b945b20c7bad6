"""transformers' model classes around the same blocks as `DeepseekLM`.

The containers are thin: embedding, layers, norm and head are the core's modules, and so is every number computed.
What is added is what transformers asks of a model: its caches and masks, recorded outputs, gradient checkpointing per
layer, attention weights under `attn_implementation="eager"`, and a load that fails rather than leaving weights random.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from deepseek_kernels.spans import as_dense, causal_mask

from ..balance import BalanceLoss
from ..config import DeepseekConfig
from ..fp8_layer import FP8Layer
from ..fp8_linear import FP8Experts, fp8_layers
from ..layer import DecoderLayer
from ..linear import Linear
from ..masking import document_numbers
from ..mla import MultiHeadLatentAttention
from ..model import TrunkOutput
from ..moe import Experts, MoE, Router
from ..norm import RMSNorm
from ..rope import RotaryEmbedding
from ..routing import Routing
from .configuration import ArchDeepseekV3Config, as_arch_config
from .conversion import register_conversions, saving_conversions
from .drafting import generate_with_drafts
from .loading import StrictLoading
from .masking import FirstTokens, attention_mask_for, document_starts, real_tokens
from .prediction import (
    DeepseekCausalLMOutput,
    DeepseekModelOutput,
    DeepseekMTPLayer,
    loss_weight,
    prediction_losses,
    share_of_items,
)
from .resuming import accept_published_names

__all__ = [
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "DeepseekPreTrainedModel",
]

logger = logging.getLogger(__name__)


class AttentionWeights(nn.Identity):
    """Passes attention weights on; transformers' hooks record them here."""


class DeepseekAttention(MultiHeadLatentAttention):
    """Latent attention that can show its weights: with `attn_implementation="eager"` they are computed and recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_weights = AttentionWeights()
        self.config: PreTrainedConfig | None = None  # the model's, whose attention implementation may change

    input_projections = MultiHeadLatentAttention.input_projections

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None, cache: Any | None = None
    ) -> Tensor:
        """As the base class."""
        if self.config is None or self.config._attn_implementation != "eager":
            return super().forward(x, rope, mask, cache)
        q = self.queries(x, rope).transpose(1, 2)
        latents, keys, _ = self.remember(x, rope, cache)
        k_nope, values = self.expand(latents).transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key_states = torch.cat((k_nope, keys[:, None].expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        scores = q @ key_states.transpose(-1, -2) * self.softmax_scale  # [B, N, T, S]
        mask = as_dense(mask, scores.shape[-1])
        if mask is None:
            mask = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        weights = self.attention_weights(F.dropout(weights, self.dropout, self.training))
        return self.o_proj((weights @ values).transpose(1, 2).flatten(-2))


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
        routing = Routing((batch, tokens), valid) if self.training else None
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, rope, mask=mask, past_key_values=cache, routing=routing)
        if routing is not None:
            routing.commit()
        hidden = self.norm(x)
        trunk = TrunkOutput(hidden, x, rope, mask, documents) if return_trunk else None
        return DeepseekModelOutput(last_hidden_state=hidden, past_key_values=past_key_values, trunk=trunk)


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """The language model: trunk, head, and the multi-token-prediction layers of the checkpoint.

    The prediction layers are kept so that nothing of the checkpoint is lost; `forward` trains them where
    `config.mtp_loss_weight` asks for it (0.3 to 0.1 in V3's report; default 0, and then they do not run).

    Args:
        config: one of our configs, transformers' own for the same family, or a `DeepseekConfig`.

    Attributes:
        mtp_detached: whether their loss trains them alone, and neither the trunk nor the embedding and the head that
            they share with it (TRAPS F12).

    Raises:
        UnsupportedModelError: a model that cannot be built (sparse attention).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    reads_prediction_layers = True
    mtp_detached = False

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        super().__init__(config)
        core = self.config.to_core()
        self.model = DeepseekModel(self.config)
        self.vocab_size = core.vocab_size
        self.lm_head = Linear(core.hidden_size, core.vocab_size, bias=False)
        self.mtp = nn.ModuleList(DeepseekMTPLayer(core, k) for k in range(core.num_nextn_predict_layers))
        self.post_init()

    def _core_for_saving(self) -> DeepseekConfig | None:
        return self.config.to_core()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DeepseekCausalLMOutput:
        """One forward pass; see `DeepseekModel.forward` for the arguments that are not named here.

        Args:
            labels: [B, T], the tokens themselves (the shift happens in the loss), -100 where ignored.
            logits_to_keep: 0 for all positions, n for the last n, or an index tensor of positions.
            kwargs: also `num_items_in_batch` for the loss. With `output_router_logits`, `aux_loss` is the sum
                over layers of the sequence-wise balance loss without its factor, so that perfect balance gives 1 for
                each layer; it is added to the loss with the factor `router_aux_loss_coef`.

        With `config.mtp_loss_weight` above 0, labels and input_ids, and no cache given, the output has `mtp_loss`: in
        both modes the number that `DeepseekLM` gives, which training adds to the loss with that weight; in evaluation
        the loss is the next token's, to be compared with any other model's. With `num_items_in_batch`, both added
        losses, means over this call, count by its share of the targets.

        Raises:
            ValueError: as the trunk's, or a weight that is negative or has nothing to weigh.
        """
        weight = 0.0
        if labels is not None and input_ids is not None and past_key_values is None:
            weight = loss_weight(self)
        outputs: DeepseekModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_trunk=weight > 0,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        valid = real_tokens(attention_mask, hidden.shape[1])
        loss = aux_loss = mtp_loss = mtp_losses = mtp_accuracy = None
        if outputs.router_logits:
            aux_loss = self.balance_loss(outputs.router_logits, hidden.shape[:2], valid)
        if outputs.trunk is not None:
            balanced = aux_loss is not None
            mtp_losses, mtp_accuracy, more = prediction_losses(self, outputs.trunk, input_ids, labels, valid, balanced)
            mtp_loss = mtp_losses.mean()
            aux_loss = aux_loss if more is None else aux_loss + more.to(aux_loss.device)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            share = share_of_items(labels, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels"))
            if aux_loss is not None:
                loss = loss + (self.router_aux_loss_coef * share * aux_loss).to(loss.device)
            if mtp_loss is not None and self.training:
                loss = loss + (weight * share * mtp_loss).to(loss.device)
        return DeepseekCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_loss=mtp_loss,
            mtp_losses=mtp_losses,
            mtp_accuracy=mtp_accuracy,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, with every cache of transformers, beams, and draft models.

        With `use_mtp=True` the model's own prediction layers draft up to `num_assistant_tokens` tokens a step (default
        1), for any number of rows, greedy or sampling; see `deepseek_arch.generate`.

        Raises:
            ValueError: `use_mtp` without prediction layers, or with a setting that it does not go with.
        """
        configs = (kwargs.get("generation_config"), *args[1:2], self.generation_config)
        wanted = [kwargs.get("use_mtp"), *(getattr(config, "use_mtp", None) for config in configs)]
        if next((use for use in wanted if use is not None), False):
            return generate_with_drafts(self, *args, **kwargs)
        return super().generate(*args, **kwargs)

    @property
    def router_aux_loss_coef(self) -> float:
        """The balance loss's factor: `router_aux_loss_coef` of the config, else its family's (`BalanceLoss`)."""
        factor = getattr(self.config, "router_aux_loss_coef", None)
        return BalanceLoss.from_config(self.config.to_core()).sequence if factor is None else float(factor)

    def balance_loss(
        self, router_logits: tuple[Tensor, ...], shape: tuple[int, int], valid: Tensor | None = None
    ) -> Tensor:
        """V3's sequence-wise balance loss, or V2's, of all layers with experts together, without a factor.

        Args:
            router_logits: [B T, E] of each layer.
            shape: (B, T).
            valid: bool [B, T], or None where nothing is padding.
        """
        loss = replace(BalanceLoss.from_config(self.config.to_core()), sequence=1.0)
        routers = [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]
        losses = [
            loss(router, logits.float(), router.route(logits.detach().float())[1], shape, valid)
            for router, logits in zip(routers, router_logits, strict=True)
        ]
        return torch.stack([each.to(losses[0].device) for each in losses]).sum()


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """The trunk with a classifier on the last token of each row."""

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        # Not the generic class's constructor: it asks AutoModel, which knows us only while registered.
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = self.config.num_labels
        self.model = DeepseekModel(self.config)
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(GenericForTokenClassification, DeepseekPreTrainedModel):
    """The trunk with a classifier on every token."""

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = self.config.num_labels
        self.model = DeepseekModel(self.config)
        dropout = getattr(self.config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(self.config.hidden_size, self.num_labels)
        self.post_init()


for _model in (DeepseekModel, DeepseekForSequenceClassification, DeepseekForTokenClassification):
    register_conversions(_model.__name__)
register_conversions(DeepseekForCausalLM.__name__, causal_lm=True)
