"""The main model: embedding, decoder layers and final norm.

Notation: B batch, T tokens of this call, S keys, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.key_selection import KeySelection
from ..attention.masking import attention_mask_for_documents, document_numbers, positions_from_mask
from ..attention.mla import MultiHeadLatentAttention
from ..attention.sparse_attention import SparseLatentAttention
from ..cache.latent_cache import LatentCache
from ..config.argument_types import check_types, shown
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import MLP, Embedding
from ..layers.norm import RMSNorm, add_and_normalize, normalize
from ..layers.rope import RotaryEmbedding, Rotation
from ..moe.moe import MoE
from ..moe.routing import Routing
from .outputs import Places, TrunkOutput
from .side_results import recomputed
from .tensor_checks import as_int64, check_dense, check_multiplicative, check_token_ids, is_readable, nonzero

__all__ = ["DecoderLayer", "DeepseekModel", "check_mask", "check_positions"]


@check_types
class DecoderLayer(nn.Module):
    """Decoder layer `layer_idx`: attention and a dense MLP or experts, each behind a norm and a residual.

    Subclasses may set `attention_class`, and `sparse_attention_class` for models with sparse attention, to other
    implementations of the same attention.
    """

    attention_class: type[MultiHeadLatentAttention] = MultiHeadLatentAttention
    sparse_attention_class: type[SparseLatentAttention] = SparseLatentAttention

    def __init__(
        self,
        config: DeepseekConfig,
        layer_idx: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer_idx, self.has_experts = layer_idx, config.is_moe_layer(layer_idx)
        self.is_sparse = config.is_sparse_attention
        kind = self.sparse_attention_class if self.is_sparse else self.attention_class
        self.self_attn = kind.from_config(config, layer_idx, **factory)
        self.mlp: MoE | MLP
        if self.has_experts:
            self.mlp = MoE.from_config(config, layer_idx, **factory)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act, **factory)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)

    def forward(
        self,
        x: Tensor,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: Any | None = None,
        routing: Routing | None = None,
        selection: KeySelection | None = None,
    ) -> Tensor:
        """Maps [B, T, H] to the same shape; arguments as for `MultiHeadLatentAttention.forward` and `MoE.forward`.

        Args:
            selection: the pass's, of a model with sparse attention.
        """
        attention, mlp = self.self_attn, self.mlp
        normed = normalize(self.input_layernorm, x, attention)
        chosen = (selection,) if self.is_sparse else ()  # the module may be wrapped: its type says nothing
        attended = attention(normed, rope, mask, cache, *chosen)
        normed, x = add_and_normalize(self.post_attention_layernorm, attended, x, mlp)
        if routing is None or not self.has_experts:  # the block may be wrapped: its type says nothing
            return x + mlp(normed)
        return x + mlp(normed, routing)


@check_types
class DeepseekModel(nn.Module):
    """The main model: token ids to final hidden states."""

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.is_sparse = config, config.is_sparse_attention
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
        selection: KeySelection | None = None,
    ) -> TrunkOutput:
        """Runs the layers; see `DeepseekLM.forward` for the arguments."""
        x = self.embed(input_ids, inputs_embeds)
        batch, tokens = x.shape[:2]
        valid = check_mask(attention_mask, x, cache)
        selection = self.new_selection(selection, valid)
        if position_ids is not None:
            position_ids = check_positions(position_ids, x)
        if cache is None:
            places = self.places(valid, position_ids, batch, tokens, x.device)
            x = self.run_layers(self.layers, x, places.rope, places.mask, None, routing, selection)
            return TrunkOutput(self.norm(x), x, *places)
        self._check_cache(cache, batch, x.dtype)
        looks = position_ids is not None and not torch.compiler.is_compiling()
        if looks and document_numbers(position_ids, valid) is not None:
            raise ValueError("expected one document a row with a cache, got position_ids that start again within a row")
        with cache.append(tokens, valid) as slots:
            rope = self.rope(slots if position_ids is None else position_ids)
            mask = cache.spans(slots, valid)
            x = self.run_layers(self.layers, x, rope, mask, cache, routing, selection)
            return TrunkOutput(self.norm(x), x, rope, mask, None)

    def places(
        self, valid: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, device: torch.device
    ) -> Places:
        """Returns the places of [B, T] tokens, of a pass without a cache.

        Args:
            valid: bool [B, T], or None where nothing is padding.
            position_ids: int [B or 1, T], or None to count each row's real tokens.
        """
        documents = None if position_ids is None else document_numbers(position_ids, valid)
        if position_ids is None:
            position_ids = positions_from_mask(valid, batch, tokens, device)
        return Places(self.rope(position_ids), attention_mask_for_documents(documents, valid, batch), documents)

    def run_layers(
        self,
        layers: Iterable[nn.Module],
        x: Tensor,
        rope: Rotation,
        mask: Tensor | None,
        cache: LatentCache | None,
        routing: Routing | None,
        selection: KeySelection | None,
    ) -> Tensor:
        """Runs some of the layers in order, [B, T, H] to the same shape; recomputes them where that is switched on."""
        recomputes = self.gradient_checkpointing and self.training and cache is None
        if selection is not None and selection.stage is not None and cache is not None:
            # It carries no gradient to the indexers' keys.
            raise ValueError("expected no cache with the loss of the indexers, got one")
        chosen = () if selection is None else (selection,)
        for layer in layers:
            if recomputes:
                x = recomputed(layer, x, rope, mask, None, routing=routing, selection=selection)
            else:
                x = layer(x, rope, mask, cache, routing, *chosen)
                if routing is not None and type(x) is tuple:  # of transformers' class, which keeps it apart
                    x, side, *kept = x
                    side.join(routing, selection, layer.layer_idx, kept)
        return x

    def new_selection(self, given: KeySelection | None, valid: Tensor | None) -> KeySelection | None:
        """Returns the selections of this pass, None for a model with dense attention."""
        if not self.is_sparse:
            if given is not None:
                raise ValueError("expected no KeySelection for a model with dense attention, got one")
            return None
        selection = KeySelection() if given is None else given
        selection.valid = valid
        return selection

    def _check_cache(self, cache: LatentCache, batch: int, dtype: torch.dtype) -> None:
        c = self.config
        if not isinstance(cache, LatentCache):
            raise ValueError(f"expected cache to be a LatentCache, got {shown(cache)}")
        if cache.batch_size != batch:
            raise ValueError(f"expected a cache for {batch} rows, got one for {cache.batch_size}")
        expected = (c.num_hidden_layers, 0, c.kv_lora_rank, c.qk_rope_head_dim, c.index_head_dim)
        got = (cache.num_layers, cache.first_layer, cache.kv_lora_rank, cache.qk_rope_head_dim, cache.index_head_dim)
        if got != expected:
            names = "(layers, first layer, kv_lora_rank, qk_rope_head_dim, index_head_dim)"
            raise ValueError(f"expected this model's cache {names} {expected}, got {got}")
        if cache.dtype != dtype and not torch.is_autocast_enabled(cache.device.type):
            raise ValueError(f"expected a cache of dtype {dtype}, got {cache.dtype}")

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Returns token embeddings [B, T, H] of ids [B, T], or `inputs_embeds` as it is.

        Raises:
            ValueError: neither or both are given, a shape is wrong, or an id lies outside the vocabulary.
        """
        tokens = self.check_tokens(input_ids, inputs_embeds)
        return tokens if input_ids is None else self.embed_tokens(tokens)

    def check_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Returns what `embed` looks up, or `inputs_embeds`; raises what it raises."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            weight = next(self.embed_tokens.parameters())
            check_dense("inputs_embeds", inputs_embeds, weight)
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"expected inputs_embeds [B, T, {self.config.hidden_size}], got {list(inputs_embeds.shape)}"
                )
            dtype = weight.dtype
            autocast = torch.is_autocast_enabled(inputs_embeds.device.type)
            if inputs_embeds.dtype != dtype and dtype.is_floating_point and not autocast:
                raise ValueError(f"expected inputs_embeds of dtype {dtype}, got {inputs_embeds.dtype}")
            return inputs_embeds
        assert input_ids is not None
        beside = next(self.embed_tokens.parameters()) if getattr(input_ids, "is_meta", False) else input_ids
        return check_token_ids(input_ids, self.config.vocab_size, beside)


def check_mask(mask: Tensor | None, x: Tensor, cache: LatentCache | None) -> Tensor | None:
    """Returns the attention mask of this call's tokens, bool [B, T], or None where nothing is padding."""
    if mask is None:
        return None
    batch, tokens = x.shape[:2]
    check_dense("attention_mask", mask, x)
    wide_enough = mask.ndim == 2 and (mask.shape[-1] == tokens or (cache is not None and mask.shape[-1] > tokens))
    if not wide_enough or mask.shape[0] != batch:
        raise ValueError(f"expected attention_mask [{batch}, {tokens}], got {list(mask.shape)}")
    if mask.is_floating_point() and is_readable(mask):
        check_multiplicative(mask)
    return nonzero(mask[:, -tokens:])


def check_positions(position_ids: Tensor, x: Tensor) -> Tensor:
    """Returns positions [B or 1, T] as int64, of the tokens of x [B, T, ...]; raises ValueError for anything else."""
    batch, tokens = x.shape[:2]
    check_dense("position_ids", position_ids, x)
    if tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"expected position_ids [{batch}, {tokens}], got {list(position_ids.shape)}")
    return as_int64("position_ids", position_ids)
