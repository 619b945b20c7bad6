"""Latent attention to selected keys: DeepSeek sparse attention (V3.2 report, section 2.1).

A lightning indexer selects the keys of each query, and attention reads only these, in one of two forms as in dense
latent attention. Absorbed: each query gathers its keys' latents (`deepseek_kernels.sparse_mla`), so that its cost does
not depend on the length of the context. Expanded: latents become per-head keys and values, and a block of queries
attends to them with a mask of its selections; cheaper for prompts of up to a few times `top_k` tokens. Up to `top_k`
keys nothing can be left out, and attention is the dense one.

Notation: as in `mla`, and K selected keys of a query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_kernels import dequantize_blocks, mla_attention, quantize_rows, sparse_mla, topk_select
from deepseek_kernels import rope as rotate

from ..cache.latent_cache import LatentCache
from ..config.deepseek_config import DeepseekConfig
from ..layers.rope import Rotation
from ..layers.unreached import connect
from .indexer_loss import attention_mass, indexer_loss
from .key_selection import KeySelection
from .lightning_indexer import LightningIndexer, query_blocks
from .mla import MultiHeadLatentAttention, differentiated, is_hooked, latents_and_keys

__all__ = ["SparseLatentAttention"]

_PAIRS = 2**23  # (query, key) pairs of a block's mask


class SparseLatentAttention(MultiHeadLatentAttention):
    """Latent attention whose queries attend to `top_k` keys each.

    Args:
        indexer: selects the keys; None for a layer that shares the selection of layer `selecting_layer` (GLM-5).
        top_k: keys of a query.
        selecting_layer: the layer whose selection this one uses, default its own.
        keeps_selection: True if a later layer shares this one's selection.
        simulate_fp8: see `DeepseekConfig`. A cache in FP8 makes the indexer FP8 too, whatever this says.
    """

    def __init__(
        self,
        *args: Any,
        indexer: LightningIndexer | None,
        top_k: int,
        selecting_layer: int | None = None,
        keeps_selection: bool = False,
        simulate_fp8: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.indexer, self.top_k = indexer, top_k
        self.selecting_layer = self.layer_idx if selecting_layer is None else selecting_layer
        self.keeps_selection, self.simulate_fp8 = keeps_selection, simulate_fp8

    @classmethod
    def arguments(cls, config: DeepseekConfig, layer_idx: int, *, device=None, dtype=None) -> dict[str, Any]:
        """Returns the keyword arguments that a config implies."""
        own = config.has_indexer(layer_idx)
        following = layer_idx + 1 < config.num_hidden_layers and not config.has_indexer(layer_idx + 1)
        return super().arguments(config, layer_idx, device=device, dtype=dtype) | {
            "indexer": LightningIndexer.from_config(config, device=device, dtype=dtype) if own else None,
            "top_k": config.indexer_sizes.topk,
            "selecting_layer": max(layer for layer in range(layer_idx + 1) if config.has_indexer(layer)),
            "keeps_selection": own and following,
            "simulate_fp8": config.simulate_fp8,
        }

    def norm_consumers(self) -> tuple[nn.Module, ...]:
        """Returns none: the indexer's weights read the input in high precision."""
        return ()

    def forward(
        self,
        x: Tensor,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: Any | None = None,
        selection: KeySelection | None = None,
    ) -> Tensor:
        """Attends and projects back.

        Args:
            x, rope: as for the base class.
            mask: None for causal attention, spans or bool; not additive.
            cache: as for the base class; its `update_indexer(keys [B, T, D], layer_idx)` returns the indexer's keys of
                all S tokens.
            selection: the pass's; needed where a selection is shared.

        Returns:
            [B, T, H].

        Raises:
            ValueError: the mask is additive, or a shared selection is missing.
        """
        if mask is not None and mask.is_floating_point():
            raise ValueError(f"expected spans or a bool mask with sparse attention, got {mask.dtype}")
        stage = None if selection is None else selection.stage
        latents = self.q_a_layernorm(self.q_a_proj(x))  # [B, T, Q]
        q = self.rotated_queries(self.q_b_proj, self.q_b_proj(latents), rope)
        index_keys = self._index_keys(x, rope, cache, stage)  # before the cache counts the tokens
        states = self.append_to_cache(x, rope, cache)
        keys = (states[0] if isinstance(states, tuple) else states).shape[1]
        ids = None
        # An exported program selects among any number of keys: up to `top_k`, all of them.
        if (torch.compiler.is_exporting() or keys > self.top_k) and stage != "dense":
            ids = self._select(x, latents, rope, index_keys, mask, selection)
        elif selection is not None and selection.recording:
            everything = x.new_zeros(1, 1, 1, dtype=torch.float32).expand(*x.shape[:2], keys)
            selection.ids[self.layer_idx] = topk_select(everything, keys, mask)
        if stage is not None and self.indexer is not None:
            assert selection is not None and index_keys is not None
            expanded = latents_and_keys(states, cache)
            indexer_loss(self, x, latents, q, rope, index_keys, expanded, mask, ids, selection)
        out = self.attend(q, states, mask, cache) if ids is None else self.attend_selected(q, states, ids, mask, cache)
        out = self.o_proj(out.flatten(-2))
        return connect(out, (self.indexer,)) if self.training and self.indexer is not None else out

    def mass(self, q: Tensor, expanded: Tensor, rotated: Tensor, seen: Tensor) -> Tensor:
        """Returns `attention_mass` of all heads, which the indexer learns."""
        return attention_mass(q, expanded, rotated, seen, self.softmax_scale)

    def append_to_cache(self, x: Tensor, rope: Rotation, cache: Any | None) -> Tensor | tuple[Tensor, Tensor]:
        """Appends as the base class; with `simulate_fp8`, latents as FP8 has them."""
        if not self.simulate_fp8:
            return super().append_to_cache(x, rope, cache)
        kv = self.kv_a_proj_with_mqa(x)
        latent, key = _through_fp8(self.kv_a_layernorm(kv[..., : self.kv_lora_rank])), kv[..., self.kv_lora_rank :]
        key = rotate(key, *rope)
        if cache is None:
            return latent, key
        if isinstance(cache, LatentCache):
            return cache.update_states(torch.cat((latent, key), dim=-1), self.layer_idx)
        latents, keys = cache.update(latent[:, None], key[:, None], self.layer_idx)
        return latents[:, 0], keys[:, 0]

    def _index_keys(self, x: Tensor, rope: Rotation, cache: Any | None, stage: str | None) -> Tensor | None:
        """Returns the indexer's keys of all tokens, the cached ones included; without a gradient to x (TRAPS G6)."""
        if self.indexer is None:
            return None
        packed = self.simulate_fp8 or getattr(cache, "index_format", None) == "fp8"
        packed = packed and stage is None  # bytes carry no gradient
        keys = self.indexer.keys(x.detach(), rope, packed)
        return keys if cache is None else cache.update_indexer(keys.detach(), self.layer_idx)

    def _select(
        self,
        x: Tensor,
        latents: Tensor,
        rope: Rotation,
        index_keys: Tensor | None,
        mask: Tensor | None,
        selection: KeySelection | None,
    ) -> Tensor:
        """Returns the selected keys, int32 [B, T, K], the indexer's or those that another layer has selected."""
        if self.indexer is None:
            if selection is None:
                raise ValueError(f"expected a KeySelection with the keys that layer {self.selecting_layer} selected")
            ids = selection.of(self.selecting_layer)
        else:
            assert index_keys is not None
            ids = self.indexer.select(x, latents, rope, index_keys, mask)
        if selection is not None and (self.keeps_selection or selection.recording):
            selection.ids[self.layer_idx] = ids
        return ids

    def prefers_gathered(self, queries: int, keys: int) -> bool:
        """Returns True if the absorbed form on gathered keys costs fewer multiplications for T queries on S keys.

        Per head, absorbing costs (P + V) C a query and attending 2 C + R a selected key, where expanding costs the same
        (P + V) C a key and attending P + R + V (after padding to one width) for every key that a query sees.
        """
        if self.training and self.dropout > 0:
            return False  # the absorbed form has no dropout
        if torch.compiler.is_exporting():
            return queries == 1  # costs of symbolic lengths cannot be compared
        form = (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
        seen = queries * keys - queries * (queries - 1) // 2
        gathered = queries * form + queries * self.top_k * 2 * (self.kv_lora_rank + self.qk_rope_head_dim)
        return gathered < keys * form + seen * 2 * max(self.qk_head_dim, self.v_head_dim)

    def attend_selected(self, q: Tensor, states: Any, ids: Tensor, mask: Tensor | None, cache: Any | None) -> Tensor:
        """Attends to selected keys, in the cheaper form -> [B, T, N, V]."""
        keys = (states[0] if isinstance(states, tuple) else states).shape[1]
        if self.prefers_gathered(q.shape[1], keys) and not is_hooked(self.kv_b_proj):
            joined = torch.cat(states, dim=-1) if isinstance(states, tuple) else states
            return self.attend_gathered(q, joined, ids)
        return self.attend_masked(q, *latents_and_keys(states, cache), ids, mask)

    def attend_gathered(self, q: Tensor, states: Tensor, ids: Tensor) -> Tensor:
        """Attends in the absorbed form to the latents `ids` of states [B, S, C + R], or of bytes -> [B, T, N, V]."""
        return self.absorbed(q, lambda q: sparse_mla(q, states, ids, self.kv_lora_rank, self.softmax_scale))

    def attend_masked(self, q: Tensor, latents: Tensor, keys: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Attends in the expanded form, a block of queries at a time -> [B, T, N, V].

        Args:
            latents, keys: [B, S, C] and [B, S, R].
            mask: of all queries; the selection implies it, and it says which keys a block can do without.
        """
        expanded, dropout = self.expand(latents), self.dropout if self.training else 0.0

        def attend(q: Tensor, expanded: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
            return mla_attention(q, expanded, keys, self.softmax_scale, selection_mask(ids, keys.shape[1]), dropout)

        if torch.compiler.is_exporting():  # sizes may be symbols, of which no blocks can be counted
            return attend(q, expanded, keys, ids)
        blocks = list(query_blocks(mask, q.shape[0], q.shape[1], latents.shape[1], _PAIRS))
        # Kept for the backward pass, the masks of all blocks would be one of all queries and keys.
        again = len(blocks) > 1 and differentiated(q, expanded, keys)
        outs = []
        for part in blocks:
            operands = q[:, part.queries], expanded[:, : part.keys], keys[:, : part.keys], ids[:, part.queries]
            outs.append(checkpoint(attend, *operands, use_reentrant=False) if again else attend(*operands))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]


def _through_fp8(x: Tensor) -> Tensor:
    """Rounds [..., C] to FP8 and back, groups of 128 with power-of-two scales; its gradient is that of no rounding."""
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows.float() if rows.dtype == torch.float64 else rows
    codes, scale = quantize_rows(rows, "ue8m0")
    rounded = dequantize_blocks(codes, scale, (1, 128), rows.dtype).reshape(x.shape).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad and torch.is_grad_enabled() else rounded


def selection_mask(ids: Tensor, keys: int) -> Tensor:
    """Returns the mask of selections int32 [B, t, K], bool [B, 1, t, S]."""
    mask = torch.zeros(*ids.shape[:2], keys + 1, dtype=torch.bool, device=ids.device)
    places = torch.where(ids < 0, keys, ids).long()  # places behind the last index go to one column more
    return mask.scatter_(-1, places, True)[:, None, :, :keys]
