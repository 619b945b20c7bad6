"""The trunk and the language model: embedding, decoder layers, final norm, head, multi-token prediction.

Notation: B batch, T tokens of this call, S keys, H hidden_size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .balance import BalanceLoss, Capacity
from .cache import LatentCache
from .config import DeepseekConfig, UnsupportedModelError
from .layer import DecoderLayer
from .linear import Embedding, Linear
from .losses import cross_entropy, head_losses, ignore
from .masking import attention_mask_for_documents, document_numbers, positions_from_mask
from .moe import Experts, MoE, Router
from .mtp import MTPLayer, mtp_losses, shift_labels
from .norm import RMSNorm
from .rope import RotaryEmbedding
from .routing import Routing, RoutingRecord

__all__ = ["CausalLMOutput", "DecoderLayer", "DeepseekLM", "DeepseekModel", "TrunkOutput", "allocate"]


@dataclass
class TrunkOutput:
    """What the trunk gives back.

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
    """What the language model gives back.

    Attributes:
        logits: [B, kept, vocab_size], or None with `return_logits=False`.
        loss: mean cross-entropy of the next token, float32 scalar, when labels were given; in training mode plus
            `aux_loss`. Losses are means over this call: accumulated over calls they are those of one call with all rows
            where every call has as many targets; else weigh each by its own number (targets for `loss` and, by depth,
            for `mtp_losses`; rows for `aux_loss`).
        aux_loss: in training mode, the sum over layers of `DeepseekLM.balance_loss`, its factors included.
        mtp_loss: mean over depths of the cross-entropy of the tokens further ahead, unweighted and not part of `loss`,
            when labels and input_ids were given, no cache was, and the model has multi-token-prediction layers. Train
            on `loss + weight * mtp_loss`; `mtp.mtp_weight` is V3's schedule of the weight.
        mtp_losses, mtp_accuracy: float32 [D], by depth: its loss, and how often its best guess was right.
        hidden_states: [B, T, H], the trunk's output after the final norm.
        routing: every routing decision, when `record_routing` was asked for.
    """

    logits: Tensor | None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    mtp_losses: Tensor | None = None
    mtp_accuracy: Tensor | None = None
    hidden_states: Tensor | None = None
    routing: RoutingRecord | None = None


class DeepseekModel(nn.Module):
    """The trunk: token ids to final hidden states."""

    def __init__(self, config: DeepseekConfig, *, device=None, dtype=None) -> None:
        super().__init__()
        if config.is_sparse_attention:
            raise UnsupportedModelError(
                f"expected a model with dense latent attention, got {config.model_type} with index_topk="
                f"{config.index_topk}: DeepSeek sparse attention is not implemented yet, so this model cannot be built "
                "(its config, parameter counts and plan work)"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(DecoderLayer(config, i, **factory) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.rope = RotaryEmbedding.from_config(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        inputs_embeds: Tensor | None = None,
        routing: Routing | None = None,
    ) -> TrunkOutput:
        """Runs the layers; see `DeepseekLM.forward` for the arguments."""
        x = self.embed(input_ids, inputs_embeds)
        batch, tokens = x.shape[:2]
        valid = _check_mask(attention_mask, batch, tokens, cache)
        if position_ids is not None and tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
            raise ValueError(f"expected position_ids [{batch}, {tokens}], got {list(position_ids.shape)}")
        if cache is not None:
            self._check_cache(cache, batch, x.dtype)
        documents = None
        if cache is None or not torch.compiler.is_compiling():
            documents = document_numbers(position_ids, valid)
        if cache is not None and documents is not None:
            raise ValueError("expected one document a row with a cache, got position_ids that start again within a row")
        with cache.append(tokens, valid) if cache is not None else nullcontext() as slots:
            if slots is not None:
                mask = cache.spans(slots, valid)
                positions = slots if position_ids is None else position_ids
            else:
                mask = attention_mask_for_documents(documents, valid, batch)
                positions = (
                    positions_from_mask(valid, batch, tokens, x.device) if position_ids is None else position_ids
                )
            rope = self.rope(positions)
            for layer in self.layers:
                if self.gradient_checkpointing and self.training and cache is None:
                    x = checkpoint(layer, x, rope, mask, None, routing, use_reentrant=False)
                else:
                    x = layer(x, rope, mask, cache, routing)
        return TrunkOutput(self.norm(x), x, rope, mask, documents)

    def _check_cache(self, cache: LatentCache, batch: int, dtype: torch.dtype) -> None:
        c = self.config
        if cache.batch_size != batch:
            raise ValueError(f"expected a cache for {batch} rows, got one for {cache.batch_size}")
        expected = (c.num_hidden_layers, 0, c.kv_lora_rank, c.qk_rope_head_dim)
        got = (cache.num_layers, cache.first_layer, cache.kv_lora_rank, cache.qk_rope_head_dim)
        if got != expected:
            names = "(layers, first layer, kv_lora_rank, qk_rope_head_dim)"
            raise ValueError(f"expected this model's cache {names} {expected}, got {got}")
        if cache.dtype != dtype and not torch.is_autocast_enabled(cache.device.type):
            raise ValueError(f"expected a cache of dtype {dtype}, got {cache.dtype}")

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, H] of ids [B, T], or `inputs_embeds` as it is.

        Raises:
            ValueError: neither or both are given, a shape is wrong, or an id lies outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"expected inputs_embeds [B, T, {self.config.hidden_size}], got {list(inputs_embeds.shape)}"
                )
            return inputs_embeds
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.shape[1]:
            raise ValueError(
                f"expected integer input_ids [B, T] with T >= 1, got {list(input_ids.shape)} {input_ids.dtype}"
            )
        # On an accelerator the look would wait for the device; its own assertion catches the mistake there.
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"expected token ids between 0 and {self.config.vocab_size - 1}, got {low if low < 0 else high}"
                )
        return self.embed_tokens(input_ids)


class DeepseekLM(nn.Module):
    """A DeepSeek language model: trunk, head and multi-token-prediction layers.

    Parameters are named as in the published files, except that the experts of a layer are stacked
    (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`) and prediction layer `num_hidden_layers + k` is `mtp.k`.

    Args:
        config: what to build; `DeepseekConfig.from_pretrained("tiny")` for a start.
        device, dtype: where and as what to create the parameters, as torch's own factories. Weights are random
            (normal, `config.initializer_range`); on device "meta" nothing is allocated.

    Attributes:
        balance_loss: what training adds to the loss for each layer with experts; may be replaced.
        capacity: V2's token dropping in training, None for none.
        mtp_detached: whether `mtp_loss` trains the multi-token-prediction layers alone, and neither the trunk nor the
            embedding and the head that they share with it: what reinforcement learning wants (TRAPS F12).

    Raises:
        UnsupportedModelError: the config describes a model with sparse attention.
    """

    def __init__(self, config: DeepseekConfig, *, device=None, dtype=None) -> None:
        super().__init__()
        target = torch.empty(0, device=device).device  # honours torch.device contexts
        # Built without memory first, so that no parameter is drawn twice.
        factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
        self.config = config
        self.balance_loss = BalanceLoss.from_config(config)
        self.capacity: Capacity | None = None
        self.mtp_detached = False
        self.model = DeepseekModel(config, **factory)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.mtp = nn.ModuleList(MTPLayer(config, k, **factory) for k in range(config.num_nextn_predict_layers))
        if target.type != "meta":
            allocate(self, target)
            self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self) -> None:
        """Draws all weights anew: normal with `config.initializer_range`, norms one, biases zero."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, Router | Experts):
                module.reset_parameters(std)
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Makes the head and the embedding one parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recomputes each decoder layer in the backward pass instead of keeping its activations (training only)."""
        self.model.gradient_checkpointing = enabled

    def new_cache(self, batch_size: int, capacity: int | None = None, format: str | None = None) -> LatentCache:
        """An empty cache for the trunk's layers, on the model's device, in its dtype or in FP8.

        Args:
            capacity: slots to allocate at first.
            format: None, or "fp8" for e4m3 latents: 656 bytes a token and layer for V3 instead of 1152.
        """
        return self._new_cache(self.config.num_hidden_layers, 0, batch_size, capacity, format)

    def new_mtp_cache(self, batch_size: int, capacity: int | None = None, depth: int | None = None) -> LatentCache:
        """An empty cache for the multi-token-prediction layers, or for the one at `depth` alone.

        Raises:
            ValueError: the model has none.
        """
        if not len(self.mtp):
            raise ValueError("expected a model with multi-token-prediction layers, got num_nextn_predict_layers 0")
        if depth is not None:
            return self._new_cache(1, self.config.num_hidden_layers + depth, batch_size, capacity)
        return self._new_cache(len(self.mtp), self.config.num_hidden_layers, batch_size, capacity)

    def _new_cache(
        self, num_layers: int, first_layer: int, batch_size: int, capacity: int | None, format: str | None = None
    ) -> LatentCache:
        return LatentCache(
            num_layers,
            batch_size,
            self.config.kv_lora_rank,
            self.config.qk_rope_head_dim,
            capacity=capacity,
            first_layer=first_layer,
            format=format,
            device=self.device,
            dtype=self.dtype,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        record_routing: bool = False,
        replay_routing: RoutingRecord | None = None,
        return_logits: bool = True,
    ) -> CausalLMOutput:
        """One forward pass, for training and for inference.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], nonzero for real tokens; padding may stand on either side. With a cache it may also
                cover the tokens before ([B, past + T]); its last T columns count.
            position_ids: int [B, T]. Default: each row counts its real tokens from 0, or goes on from its cache.
                Without a cache, positions that start again within a row mark packed documents, which do not see each
                other.
            cache: a `LatentCache`, updated in place; padding is not stored. If the call raises, it is as before.
            labels: int [B, T], the tokens themselves (the shift happens here), -100 where ignored. Padding neither
                predicts nor is predicted, and no document predicts the next one's first token.
            logits_to_keep: 0 for all positions, n for the last n, an index tensor of positions, or int64 [B, n] with
                positions for each row.
            inputs_embeds: [B, T, H] instead of input_ids.
            record_routing: whether to return every routing decision as `routing`.
            replay_routing: decisions of an earlier pass over the same tokens, to be taken again: the experts are fixed,
                their weights are this model's.
            return_logits: False where only the losses are wanted, in training above all. With a plain head (a linear
                layer without bias, hooks or adapters) the logits then never exist, but for a chunk of tokens at a time.

        Raises:
            ValueError: shapes, token ids, the cache or the recorded decisions do not fit.
        """
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("expected logits_to_keep 0 with labels, since the loss needs every position")
        if not isinstance(logits_to_keep, Tensor) and logits_to_keep < 0:
            raise ValueError(f"expected logits_to_keep >= 0, got {logits_to_keep}")
        if labels is not None:
            labels = self._check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        routing = self._routing(tokens, attention_mask, record_routing, replay_routing)
        trunk = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, routing)
        hidden = trunk.hidden_states
        if not isinstance(logits_to_keep, Tensor):
            kept = hidden[:, -logits_to_keep:]
        elif logits_to_keep.ndim == 2:
            kept = hidden.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden.shape[-1]))
        else:
            kept = hidden[:, logits_to_keep]
        out = CausalLMOutput(logits=self.lm_head(kept) if return_logits else None, hidden_states=hidden)
        if labels is not None:
            padding = None if attention_mask is None else attention_mask[:, -labels.shape[1] :] == 0
            labels = ignore(labels, padding)
            targets = ignore(shift_labels(labels, 1, trunk.documents), padding)
            if return_logits:
                out.loss = cross_entropy(out.logits, targets)
            else:
                out.loss = head_losses(self.lm_head, [hidden], [targets])[0][0]
            if len(self.mtp) and input_ids is not None and cache is None:
                out.mtp_losses, out.mtp_accuracy = self._mtp_losses(trunk, input_ids, padding, labels, routing)
                out.mtp_loss = out.mtp_losses.mean()
        if routing is not None:
            routing.commit()
            out.routing, out.aux_loss = routing.record, routing.total_loss()
            if out.loss is not None and out.aux_loss is not None:
                out.loss = out.loss + out.aux_loss
        return out

    def _routing(
        self, tokens: Tensor | None, mask: Tensor | None, record: bool, replay: RoutingRecord | None
    ) -> Routing | None:
        """What the routers are told, where there is anything to tell."""
        if tokens is None or tokens.ndim < 2 or not (self.training or record or replay):
            return None
        layers = {layer.layer_idx for layer in self.model.layers if isinstance(layer.mlp, MoE)}
        if replay is not None and layers - replay.ids.keys():
            missing = sorted(layers - replay.ids.keys())
            raise ValueError(f"expected recorded decisions for layers {sorted(layers)}, got none for {missing}")
        shape = (tokens.shape[0], tokens.shape[1])
        valid = None if mask is None or mask.ndim != 2 else mask[:, -shape[1] :] != 0
        loss = self.balance_loss if self.balance_loss.active else None
        return Routing(shape, valid, record=record, replay=replay, loss=loss, capacity=self.capacity)

    def _check_labels(self, labels: Tensor, tokens: Tensor | None) -> Tensor:
        """Labels as int64, where every one is a token id or -100."""
        if tokens is not None and labels.shape != tokens.shape[:2]:
            raise ValueError(f"expected labels {list(tokens.shape[:2])}, got {list(labels.shape)}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))]
            if wrong.numel():
                raise ValueError(
                    f"expected labels of -100 or between 0 and {self.config.vocab_size - 1}, got {int(wrong[0])}"
                )
        return labels.long()

    def mtp_hidden(self, trunk: TrunkOutput) -> Tensor:
        """The trunk's hidden state that the first prediction depth reads (TRAPS F2)."""
        return trunk.hidden_states if self.config.mtp_input == "post_norm" else trunk.pre_norm

    def mtp_forward(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        depth: int = 0,
        *,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs prediction depth `depth`.

        Args:
            hidden: [B, T, H], `mtp_hidden` of the trunk, or the hidden state of the depth before.
            next_ids: [B, T], the token `depth + 1` after each position.
            rope, mask: the trunk's, for the same positions.
            cache: from `new_mtp_cache`.
            routing: the trunk's.

        Returns:
            logits [B, T, vocab_size] of the token `depth + 2` after each position, and the hidden state [B, T, H]
            for the next depth (`config.mtp_chain`, TRAPS F3).
        """
        hidden, normed = self.mtp_states(hidden, next_ids, depth, rope=rope, mask=mask, cache=cache, routing=routing)
        return self.lm_head(normed), hidden

    def mtp_states(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        depth: int = 0,
        *,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`mtp_forward` without the head -> the hidden state [B, T, H] for the next depth, and the head's input."""
        layer = self.mtp[depth]
        embeddings = self.model.embed(next_ids)
        embeddings = embeddings.detach() if self.mtp_detached else embeddings
        if self.model.gradient_checkpointing and self.training and cache is None:
            hidden, normed = checkpoint(layer, hidden, embeddings, rope, mask, None, routing, use_reentrant=False)
        else:
            hidden, normed = layer(hidden, embeddings, rope, mask, cache, routing)
        return normed if self.config.mtp_chain == "head_norm" else hidden, normed

    def _mtp_losses(
        self, trunk: TrunkOutput, input_ids: Tensor, padding: Tensor | None, labels: Tensor, routing: Routing | None
    ) -> tuple[Tensor, Tensor]:
        """`mtp.mtp_losses` on this model's layers."""

        def run(hidden: Tensor, next_ids: Tensor, depth: int, part: Routing | None) -> tuple[Tensor, Tensor]:
            return self.mtp_states(hidden, next_ids, depth, rope=trunk.rope, mask=trunk.mask, routing=part)

        return mtp_losses(
            run,
            len(self.mtp),
            self.lm_head,
            self.mtp_hidden(trunk),
            input_ids,
            labels,
            padding=padding,
            documents=trunk.documents,
            routing=routing,
            detached=self.mtp_detached,
        )


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives meta parameters and buffers memory, uninitialized; what was shared stays shared.

    Not `to_empty`: creating a tensor like one on meta makes PyTorch import its compiler, seconds and 150 MB.
    """
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, meta in tensors.items():
                if meta is None:
                    continue
                if id(meta) not in made:
                    memory = torch.empty(meta.shape, dtype=meta.dtype, device=device)
                    made[id(meta)] = (
                        nn.Parameter(memory, meta.requires_grad) if isinstance(meta, nn.Parameter) else memory
                    )
                tensors[name] = made[id(meta)]


def _check_mask(mask: Tensor | None, batch: int, tokens: int, cache: LatentCache | None) -> Tensor | None:
    """The attention mask of this call's tokens, bool [B, T], or None where nothing is padding."""
    if mask is None:
        return None
    wide_enough = mask.shape[-1] == tokens or (cache is not None and mask.shape[-1] > tokens)
    if mask.ndim != 2 or mask.shape[0] != batch or not wide_enough:
        raise ValueError(f"expected attention_mask [{batch}, {tokens}], got {list(mask.shape)}")
    return mask[:, -tokens:] != 0
