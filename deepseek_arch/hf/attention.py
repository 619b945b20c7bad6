"""Attention and decoder-layer classes that transformers can hook into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from deepseek_kernels.common.masks import as_dense, causal_mask

from ..attention.mla import MultiHeadLatentAttention
from ..layers.rope import Rotation

__all__ = []


class AttentionWeights(nn.Identity):
    """Passes attention weights on; transformers' hooks record them here."""


class DeepseekAttention(MultiHeadLatentAttention):
    """Latent attention that can show its weights: with `attn_implementation="eager"` they are computed and recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_weights = AttentionWeights()
        self.config: PreTrainedConfig | None = None  # the model's, whose attention implementation may change

    norm_consumers = MultiHeadLatentAttention.norm_consumers  # which `forward` below does not change

    def forward(self, x: Tensor, rope: Rotation, mask: Tensor | None = None, cache: Any | None = None) -> Tensor:
        """As the base class."""
        if self.config is None or self.config._attn_implementation != "eager":
            return super().forward(x, rope, mask, cache)
        q = self.queries(x, rope).transpose(1, 2)
        latents, keys = self.latents_and_keys(x, rope, cache)
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
