"""The main model as transformers knows it: token ids to final hidden states."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..attention.key_selection import KeySelection
from ..attention.masking import document_numbers
from ..config.deepseek_config import DeepseekConfig
from ..layers.norm import RMSNorm
from ..layers.offloaded import check_not_offloaded
from ..layers.rope import RotaryEmbedding
from ..models.outputs import TrunkOutput
from ..moe.routing import Routing
from ..moe.routing_record import RoutingRecord
from .attention_mask import FirstTokens, as_visibility, attention_mask_for, document_starts, only_mask, real_tokens
from .base import DeepseekPreTrainedModel
from .cache_check import check_holds_latents
from .continuous_batching import PagedLatents
from .input_checks import checked_ids, checked_mask, checked_positions
from .key_mapping import register_conversions
from .layers import DeepseekDecoderLayer
from .lookup_tables import add_class_name
from .outputs import DeepseekModelOutput

__all__ = ["DeepseekModel"]


class DeepseekModel(DeepseekPreTrainedModel):
    """The main model: token ids to final hidden states.

    Args:
        config: one of our configs, transformers' own for the same family, or a `DeepseekConfig`.
    """

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        super().__init__(config)
        core = self.config.to_core()
        self._is_sparse = core.is_sparse_attention
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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_trunk: bool = False,
        record_routing: bool = False,
        replay_routing: RoutingRecord | None = None,
        indexer_stage: str | None = None,
        **kwargs: Any,
    ) -> DeepseekModelOutput:
        """One forward pass.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T], zero for padding, or a finished mask [B, 1, T, S].
            position_ids: [B, T]; positions that start again within a row mark packed sequences, which never attend to
                each other, with a mask and with a cache too.
            past_key_values: any cache of transformers; it holds latents and rotated keys.
            inputs_embeds: [B, T, H] instead of input_ids.
            return_trunk: returns the inputs of MTP modules as well.
            record_routing: returns every routing decision as `routing`.
            replay_routing: decisions to take instead of the routers' own, for all B x T tokens; weights are still the
                routers', and differentiable. Default: those of `replaying`, if any.
            indexer_stage: "dense" or "sparse" computes the loss of the indexers, which is then in `selection`;
                without a cache.
            kwargs: `cu_seq_lens_q` and `seq_idx` mark packed sequences as well; `output_hidden_states`,
                `output_router_logits`, and `output_attentions` (with `attn_implementation="eager"`).

        Raises:
            ValueError: ids, embeddings, the mask, positions or the cache do not fit; outputs would be recorded without
                gradients, or a cache of something else than latents (prefix tuning), or a parameter
                to be trained is offloaded.
        """
        input_ids = checked_ids(self, input_ids, inputs_embeds)
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            warnings.warn(
                f"{self.config._attn_implementation!r} computes no attention weights, so that `attentions` is empty: "
                'set attn_implementation="eager"',
                stacklevel=2,
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if self.training and given is not None:
            check_not_offloaded(self, given.device)
        self._check_recorded(kwargs)
        paged = kwargs.get("cache")  # of continuous batching, whose mask is causal although it says is_causal=False
        if paged is None and not getattr(self.config, "is_causal", True):
            raise ValueError("expected causal attention, got is_causal=False")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        check_holds_latents(past_key_values, self.config.kv_lora_rank)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        attention_mask = checked_mask(only_mask(attention_mask), x, past_key_values)
        position_ids = checked_positions(position_ids, x)
        batch, tokens = x.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        starts = document_starts(batch, tokens, past, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
        mask = attention_mask_for(self.config, x, attention_mask, position_ids, past_key_values, starts)
        selection, chosen = None, {}
        if self._is_sparse:
            mask, selection = as_visibility(mask), KeySelection(stage=indexer_stage)
            chosen = {"selection": selection}
        valid = real_tokens(attention_mask, tokens)
        if indexer_stage is not None:
            if selection is None or past_key_values is not None:
                raise ValueError("expected sparse attention, and no cache, with indexer_stage")
            selection.valid = valid
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()  # for `use_reentrant=True`, where all but the indexers is frozen
        documents = None
        if return_trunk:
            documents = document_numbers(position_ids, valid) if starts is None else starts
        if position_ids is None:
            positions = (torch.arange(tokens, device=x.device) + past)[None]
            positions = positions if starts is None else positions - starts.to(x.device)
        else:
            positions = position_ids
        cache: Any = past_key_values
        if paged is not None:
            cache = PagedLatents(paged, kwargs)
        if mask is None and cache is not None and tokens > 1 and cache.get_mask_sizes(tokens, 0)[0] > tokens:
            cache = FirstTokens(cache, tokens)
        rope = self.rotary_emb(positions)
        # Counts for `LoadBalancer`: padding is left out where the mask marks it.
        replay = self.replayed_routing if replay_routing is None else replay_routing
        routing = None
        logits = self._asked_for("router_logits", kwargs)
        if self.training or record_routing or replay is not None or logits:
            routing = Routing((batch, tokens), valid, record=record_routing, replay=replay, keep_logits=logits)
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            out = layer(x, rope, mask=mask, past_key_values=cache, routing=routing, **chosen)
            if isinstance(out, tuple):
                out, side, *kept = out
                side.join(routing, selection, i, kept)
            x = out
        if routing is not None:
            routing.commit()
        hidden = self.norm(x)
        trunk = TrunkOutput(hidden, x, rope, mask, documents) if return_trunk else None
        record = None if routing is None else routing.record
        return DeepseekModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            router_logits=cast(Any, tuple(routing.logits.values())) if logits and routing is not None else None,
            trunk=trunk,
            selection=None if indexer_stage is None else selection,
            routing=record,
        )

    def _asked_for(self, name: str, kwargs: dict[str, Any]) -> bool:
        asked = kwargs.get(f"output_{name}")
        return bool(getattr(self.config, f"output_{name}", False) if asked is None else asked)

    def _check_recorded(self, kwargs: dict[str, Any]) -> None:
        """Raises where an output is asked for that would be recorded without gradients, though it seems to have them.

        Hooks record attention weights, and in transformers 5.17 hidden states, inside the layers, which run without
        gradients under `use_reentrant=True`. Router logits are outputs of the layers.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return
        function = getattr(self, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant") is False:
            return
        hooked = ["attentions"] * (self.config._attn_implementation == "eager")
        hooked += ["hidden_states"] * ("__call__" in vars(GradientCheckpointingLayer))
        for name in hooked:
            if self._asked_for(name, kwargs):
                raise ValueError(
                    f'expected gradient_checkpointing_kwargs={{"use_reentrant": False}} with output_{name}, got '
                    "recomputation under which they are recorded without gradients"
                )


register_conversions(DeepseekModel.__name__)
add_class_name("Model", DeepseekModel.__name__)
