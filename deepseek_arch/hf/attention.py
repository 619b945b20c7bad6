"""Attention and decoder-layer classes that transformers can hook into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from deepseek_kernels.common.masks import as_dense, causal_mask

from ..attention.mla import MultiHeadLatentAttention, latents_and_keys
from ..attention.sparse_attention import SparseLatentAttention, selection_mask

__all__ = []


class AttentionWeights(nn.Identity):
    """Passes attention weights on; transformers' hooks record them here."""


class ShowsWeights(MultiHeadLatentAttention):
    """Latent attention that can show its weights: with `attn_implementation="eager"` they are computed and recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_weights = AttentionWeights()
        self.config: PreTrainedConfig | None = None  # the model's, whose attention implementation may change

    @property
    def is_eager(self) -> bool:
        """True if weights are to be computed."""
        return self.config is not None and self.config._attn_implementation == "eager"

    def attend(
        self, q: Tensor, states: Tensor | tuple[Tensor, Tensor], mask: Tensor | None, cache: Any | None
    ) -> Tensor:
        """As the base class."""
        if not self.is_eager:
            return super().attend(q, states, mask, cache)
        return self.attend_visibly(q, *latents_and_keys(states, cache), mask)

    def attend_visibly(self, q: Tensor, latents: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Attends in the expanded form, step by step -> [B, T, N, V].

        Args:
            q: [B, T, N, P + R].
            latents, keys: [B, S, C] and [B, S, R].
        """
        q, expanded = q.transpose(1, 2), self.expand(latents).transpose(1, 2)
        k_nope, values = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key_states = torch.cat((k_nope, keys[:, None].expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        scores = q @ key_states.transpose(-1, -2) * self.softmax_scale  # [B, N, T, S]
        mask = as_dense(mask, scores.shape[-1])
        if mask is None:
            mask = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        weights = self.attention_weights(F.dropout(weights, self.dropout, self.training))
        return (weights @ values).transpose(1, 2)


class DeepseekAttention(ShowsWeights):
    """Latent attention to all keys."""

    norm_consumers = MultiHeadLatentAttention.norm_consumers  # the base class's forward


class DeepseekSparseAttention(ShowsWeights, SparseLatentAttention):
    """Latent attention to selected keys."""

    norm_consumers = SparseLatentAttention.norm_consumers

    def attend_selected(self, q: Tensor, states: Any, ids: Tensor, mask: Tensor | None, cache: Any | None) -> Tensor:
        """As the base class."""
        if not self.is_eager:
            return super().attend_selected(q, states, ids, mask, cache)
        latents, keys = latents_and_keys(states, cache)
        return self.attend_visibly(q, latents, keys, selection_mask(ids, latents.shape[1]))
