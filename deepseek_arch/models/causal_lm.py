"""The language model: main model, head, multi-token-prediction modules and their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.key_selection import KeySelection
from ..attention.lightning_indexer import KeyNorm
from ..cache.latent_cache import LatentCache
from ..config.argument_types import check_types, shown
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..layers.offloaded import check_not_offloaded
from ..layers.rope import Rotation
from ..layers.unreached import connect
from ..moe.balance_loss import BalanceLoss
from ..moe.moe import Experts, Router
from ..moe.routing import Routing
from ..moe.routing_record import RoutingRecord
from ..moe.token_dropping import TokenDropping
from .allocate import allocate
from .losses import cross_entropy, gathers_logits, head_losses, ignore
from .main_model import DeepseekModel
from .mtp_chain import mtp_chain_losses, mtp_input, mtp_step
from .mtp_layer import MTPLayer
from .mtp_loss import count_targets, shift_labels
from .outputs import CausalLMOutput, MTPStep, TrunkOutput
from .tensor_checks import as_int64, check_dense, check_kept, check_labels, nonzero

__all__ = ["DeepseekLM", "kept_states"]


@check_types
class DeepseekLM(nn.Module):
    """A DeepSeek language model: main model, head and multi-token-prediction (MTP) modules.

    Parameters are named as in the published files, except that the experts of a layer are stacked
    (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`) and layer `num_hidden_layers + k`, an MTP module, is `mtp.k`.

    Args:
        config: the architecture; `DeepseekConfig.from_pretrained("tiny")` for a start.
        device, dtype: of the parameters, as for torch's own factories. Weights are random (normal,
            `config.initializer_range`); on device "meta" nothing is allocated.

    Attributes:
        balance_loss: added to the loss in training for each layer with experts; may be replaced.
        capacity: V2's token dropping in training, None for none.
        mtp_detached: True to train the MTP modules alone by `mtp_loss`, and neither the main model nor the embedding
            and the head that they share with it, as reinforcement learning needs (TRAPS F12).
        load_report: `checkpoint.LoadReport` of a model that `load` made, else None.
        meshes: `parallel.apply.Meshes` of a model that `parallelize` has cut, else None.
        generation_config: content of the checkpoint's generation_config.json, {} without one; None if not loaded.
    """

    load_report: Any = None
    generation_config: dict[str, Any] | None = None
    meshes: Any = None

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        target = torch.empty(0, device=device).device  # honours torch.device contexts
        # Built without memory first, so that no parameter is drawn twice.
        factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
        self.config = config
        self.balance_loss = BalanceLoss.from_config(config)
        self.capacity: TokenDropping | None = None
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
            if isinstance(module, RMSNorm | KeyNorm):
                module.reset_parameters()
            elif isinstance(module, Router | Experts):
                module.reset_parameters(std)
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Makes the head and the embedding one parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Device that ids go to: the embedding's, or where it runs if its weights are offloaded."""
        device = next(self.model.embed_tokens.parameters()).device
        if device.type != "meta":
            return device
        for module in self.model.embed_tokens.modules():
            runs_on = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)  # accelerate's
            if runs_on is not None:
                return torch.device(runs_on)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations, and so of caches: the embedding's, unless FSDP casts that (`parallelize`)."""
        cast = None if self.meshes is None else self.meshes.param_dtype
        return cast or next(self.model.embed_tokens.parameters()).dtype

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recomputes each decoder layer in the backward pass instead of keeping its activations (training only)."""
        self.model.gradient_checkpointing = enabled

    @check_types
    def new_cache(self, batch_size: int, capacity: int | None = None, format: str | None = None) -> LatentCache:
        """Returns an empty cache for the main model's layers, on the model's device, in its dtype or in FP8.

        Args:
            capacity: slots to allocate at first.
            format: None, or "fp8" for e4m3 latents: 656 bytes a token and layer for V3 instead of 1152, and
                the indexer's keys in 132 for V3.2 instead of 256.
        """
        return self._new_cache(self.config.num_hidden_layers, 0, batch_size, capacity, format)

    @check_types
    def new_mtp_cache(self, batch_size: int, capacity: int | None = None, depth: int | None = None) -> LatentCache:
        """Returns an empty cache for the MTP modules, or for the one at `depth` alone.

        Raises:
            ValueError: the model has none.
        """
        if not len(self.mtp):
            raise ValueError("expected a model with multi-token-prediction layers, got num_nextn_predict_layers 0")
        if depth is not None:
            if not 0 <= depth < len(self.mtp):
                raise ValueError(f"expected depth between 0 and {len(self.mtp) - 1}, got {shown(depth)}")
            return self._new_cache(1, self.config.num_hidden_layers + depth, batch_size, capacity)
        return self._new_cache(len(self.mtp), self.config.num_hidden_layers, batch_size, capacity)

    def _new_cache(
        self, num_layers: int, first_layer: int, batch_size: int, capacity: int | None, format: str | None = None
    ) -> LatentCache:
        c = self.config
        return LatentCache(
            num_layers,
            batch_size,
            c.kv_lora_rank,
            c.qk_rope_head_dim,
            capacity=capacity,
            first_layer=first_layer,
            format=format,
            index_head_dim=c.index_head_dim,
            index_layers=[layer for layer in range(first_layer, first_layer + num_layers) if c.has_indexer(layer)],
            index_format="fp8" if c.simulate_fp8 else None,
            scale_format="ue8m0" if c.simulate_fp8 else None,
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
        selection: KeySelection | None = None,
        return_trunk: bool = False,
        mtp_step: MTPStep | None = None,
    ) -> CausalLMOutput:
        """Runs one forward pass, for training or inference.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], nonzero for real tokens; padding may be on either side. With a cache it may also
                cover the tokens before ([B, past + T]); its last T columns count.
            position_ids: int [B, T]. Default: each row counts its real tokens from 0, or goes on from its cache.
                Without a cache, positions that start again within a row mark packed documents, which do not attend to
                each other.
            cache: a `LatentCache`, updated in place; padding is not stored. If the call raises, it is as before.
            labels: int [B, T], the tokens themselves (the shift happens here), -100 where ignored. Padding neither
                predicts nor is predicted, and no document predicts the next one's first token.
            logits_to_keep: 0 for all positions, n for the last n, an index tensor of positions, or int64 [B, n] with
                positions for each row.
            inputs_embeds: [B, T, H] instead of input_ids.
            record_routing: returns every routing decision as `routing`.
            replay_routing: decisions of an earlier pass over the same tokens, to be taken again: the experts are fixed,
                their weights are this model's.
            return_logits: False if only the losses are needed, as in training. With a plain head (a linear layer
                without bias, hooks or adapters) logits are then made for a chunk of tokens at a time only.
            selection: of a model with sparse attention, records which keys were selected, or computes the loss of the
                indexers (returned as `indexer_loss`, no part of `loss`).
            return_trunk: returns the main model's output as `trunk`.
            mtp_step: runs one MTP module and the head instead of the main model, with the last `logits_to_keep`
                positions; `hidden_states` is then the input of the next module, and no other argument counts.

        Raises:
            ValueError: shapes, token ids, the cache or the recorded decisions do not fit, or a parameter to be trained
                is offloaded.
        """
        if mtp_step is not None:
            return self._mtp_output(mtp_step, logits_to_keep, return_logits)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        logits_to_keep, labels = self.check_options(tokens, logits_to_keep, labels, record_routing, return_logits)
        if self.training and isinstance(tokens, Tensor):
            check_not_offloaded(self, tokens.device)
        routing = self.routing_of(tokens, attention_mask, record_routing, replay_routing)
        main: TrunkOutput = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, routing, selection
        )
        hidden = connect(main.hidden_states, self.mtp) if self.training else main.hidden_states
        whole = hidden if main.part is None or not return_logits else main.part.gather(hidden)
        kept = kept_states(whole, logits_to_keep)
        out = CausalLMOutput(logits=self.lm_head(kept) if return_logits else None, hidden_states=hidden)
        if labels is not None:
            ids = input_ids if cache is None else None
            self.add_losses(out, main, ids, labels, attention_mask, routing, selection)
        out.indexer_loss = None if selection is None else selection.total_loss()
        self.add_routing(out, routing)
        out.trunk = main if return_trunk else None
        return out

    def check_options(
        self, tokens: Any, logits_to_keep: int | Tensor, labels: Tensor | None, record_routing: Any, return_logits: Any
    ) -> tuple[int | Tensor, Tensor | None]:
        """Returns `logits_to_keep` and labels of a pass over tokens, checked with its flags."""
        logits_to_keep = check_kept(logits_to_keep, tokens)
        for name, flag in (("record_routing", record_routing), ("return_logits", return_logits)):
            if flag is not True and flag is not False:
                raise ValueError(f"expected {name} to be True or False, got {shown(flag)}")
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("expected logits_to_keep 0 with labels, since the loss needs every position")
        return logits_to_keep, None if labels is None else check_labels(labels, tokens, self.config.vocab_size)

    def add_losses(
        self,
        out: CausalLMOutput,
        main: TrunkOutput,
        input_ids: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | None,
        routing: Routing | None,
        selection: KeySelection | None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Adds the cross-entropies to the output of a pass, and in training mode what they are means over.

        Args:
            out: with logits, or with the hidden states that the head reads.
            main: the main model's output.
            input_ids: [B, T] for the MTP modules; None runs none.
            labels: int64 [B, T].
            attention_mask: as given; its last T columns count.
            routing, selection: the pass's.
            embed: ids [B, T] -> embeddings [B, T, H] for the MTP modules; None for the main model's.
        """
        padding = None if attention_mask is None else ~nonzero(attention_mask[:, -labels.shape[1] :])
        labels = ignore(labels, padding)
        targets = ignore(shift_labels(labels, 1, main.documents), padding)
        if main.part is not None:
            targets = main.part.cut(targets)
        if out.logits is not None and main.part is None and not gathers_logits(self.lm_head):
            out.loss = cross_entropy(out.logits, targets)
        else:
            assert out.hidden_states is not None
            out.loss = head_losses(self.lm_head, [out.hidden_states], [targets], part=main.part)[0][0]
        if len(self.mtp) and input_ids is not None:
            out.mtp_losses, out.mtp_accuracy = mtp_chain_losses(
                self.mtp,
                self.config,
                self.model.embed if embed is None else embed,
                self.lm_head,
                main,
                as_int64("input_ids", input_ids),
                labels,
                padding=padding,
                routing=routing,
                detached=self.mtp_detached,
                recompute=self.model.gradient_checkpointing and self.training,
                selection=selection,
            )
            out.mtp_loss = out.mtp_losses.mean()
        if self.training:
            depths = 0 if out.mtp_losses is None else len(self.mtp)
            out.counts = count_targets(labels, padding, main.documents, depths)

    def add_routing(self, out: CausalLMOutput, routing: Routing | None) -> None:
        """Counts what the routers of a pass have chosen, and adds their balance losses to its output."""
        if routing is not None:
            routing.commit()
            out.routing = routing.record
            self._add_balance_losses(out, routing)

    def _mtp_output(self, step: MTPStep, logits_to_keep: int | Tensor, return_logits: bool) -> CausalLMOutput:
        hidden, normed = self.mtp_states(
            step.hidden, step.next_ids, step.depth, rope=step.rope, mask=step.mask, cache=step.cache
        )
        kept = normed if isinstance(logits_to_keep, Tensor) else normed[:, -logits_to_keep:]
        return CausalLMOutput(self.lm_head(kept) if return_logits else None, hidden_states=hidden)

    def _add_balance_losses(self, out: CausalLMOutput, routing: Routing) -> None:
        """Adds each balance loss to the loss that trains its layers.

        Those of MTP modules belong to `mtp_loss`: where that is not trained on, nothing runs their layers backward, and
        what shards parameters gathers none for them.
        """
        first = self.config.num_hidden_layers
        out.aux_loss = routing.total_loss(range(first))
        if out.loss is not None and out.aux_loss is not None:
            out.loss = out.loss + out.aux_loss
        each = [routing.total_loss((first + depth,)) for depth in range(len(self.mtp))]
        if out.mtp_loss is not None and any(loss is not None for loss in each):
            zero = out.mtp_loss.new_zeros(())
            out.mtp_aux_losses = torch.stack([zero if loss is None else loss.to(zero.device) for loss in each])
            out.mtp_loss = out.mtp_loss + out.mtp_aux_losses.mean()

    def routing_of(
        self,
        tokens: Tensor | None,
        mask: Tensor | None,
        record: bool = False,
        replay: RoutingRecord | None = None,
    ) -> Routing | None:
        """Returns the routers' settings for this pass, None if they have none."""
        if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not (self.training or record or replay is not None):
            return None  # `embed` refuses what is no batch of tokens
        if replay is not None:
            if not isinstance(replay, RoutingRecord):
                raise ValueError(f"expected replay_routing to be a RoutingRecord, got {shown(replay)}")
            layers = {i for i in range(self.config.num_hidden_layers) if self.config.is_moe_layer(i)}
            for layer, ids in replay.ids.items():
                if isinstance(ids, Tensor):  # `Routing` refuses what is none
                    check_dense(f"replay_routing of layer {layer}", ids, tokens)
            missing = sorted(layers - replay.ids.keys())
            if missing:
                raise ValueError(f"expected recorded decisions for layers {sorted(layers)}, got none for {missing}")
        shape = (tokens.shape[0], tokens.shape[1])
        readable = isinstance(mask, Tensor) and mask.ndim == 2 and mask.layout == torch.strided
        valid = nonzero(mask[:, -shape[1] :]) if readable and mask is not None else None
        loss = self.balance_loss if self.balance_loss.active else None
        return Routing(shape, valid, record=record, replay=replay, loss=loss, capacity=self.capacity)

    def mtp_hidden(self, main: TrunkOutput) -> Tensor:
        """Returns the main model's hidden state that the first MTP module reads (TRAPS F2)."""
        return mtp_input(main, self.config)

    def mtp_forward(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        depth: int = 0,
        *,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs MTP module `depth` and the head.

        Args:
            hidden: [B, T, H], `mtp_hidden` of the main model, or the hidden state that the module before returned.
            next_ids: [B, T], the token `depth + 1` after each position.
            rope, mask: the main model's, for the same positions.
            cache: from `new_mtp_cache`.
            routing: the main model's.

        Returns:
            logits [B, T, vocab_size] of the token `depth + 2` after each position, and the hidden state [B, T, H]
            for the next module (`config.mtp_chain`, TRAPS F3).
        """
        hidden, normed = self.mtp_states(hidden, next_ids, depth, rope=rope, mask=mask, cache=cache, routing=routing)
        return self.lm_head(normed), hidden

    def mtp_states(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        depth: int = 0,
        *,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs `mtp_forward` without the head -> the hidden state [B, T, H] for the next module, and the head's."""
        recompute = self.model.gradient_checkpointing and self.training and cache is None
        embeddings = self.model.embed(next_ids)
        return mtp_step(
            self.mtp[depth],
            self.config,
            hidden,
            embeddings,
            rope,
            mask,
            cache,
            routing,
            depth=depth,
            detached=self.mtp_detached,
            recompute=recompute,
        )


def kept_states(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Returns the hidden states [B, n, H] that logits are made of."""
    if not isinstance(positions, Tensor):
        return hidden[:, -min(positions, hidden.shape[1]) :] if positions else hidden
    if positions.ndim == 2:
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    return hidden[:, positions]
