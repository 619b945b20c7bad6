"""Multi-head latent attention (DeepSeek-V2 report, section 2.1; V3 report, equations 1 to 11), in its two forms.

Expanded: latents become per-head keys and values; cheapest when many queries share the expansion (prefill, training).
Absorbed: the expansion's weights move to the queries and outputs, so that attention runs on the latents themselves, as
if all heads shared one key and value head of kv_lora_rank + qk_rope_head_dim; cheapest for few queries on a long cache.
Both compute the same thing; a rule over (queries, keys) chooses.

Notation: B batch, T queries, S keys, H hidden_size, N heads, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim,
V v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_kernels import mla_attention, mla_decode, rope_
from deepseek_kernels import rope as rotate
from deepseek_kernels.attention.head_projection import latents_to_values, queries_to_latents, reads_codes

from ..cache.latent_cache import LatentCache
from ..config.argument_types import Size, check_types
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import Linear, dense_weight, fp8_weight, is_plain_linear, is_plain_module
from ..layers.norm import RMSNorm, normalize
from ..layers.rope import Rotation

__all__ = ["MultiHeadLatentAttention", "differentiated", "is_hooked", "latents_and_keys"]


@check_types
class MultiHeadLatentAttention(nn.Module):
    """Attention over a compressed key-value latent.

    Args:
        softmax_scale: default `(qk_nope_head_dim + qk_rope_head_dim) ** -0.5`, in both forms (TRAPS A13); YaRN
            multiplies it (`DeepseekConfig.softmax_scale`).
        q_lora_rank: None for a single `q_proj` without a query latent (V2-Lite, Moonlight).
        norm_eps: epsilon of the latent norms; 1e-6 in every published model (TRAPS B1).
        bias: biases on q_a_proj, kv_a_proj_with_mqa and o_proj.
        layer_idx: index of this layer in a cache.
    """

    def __init__(
        self,
        hidden_size: Size,
        num_heads: Size,
        *,
        kv_lora_rank: Size,
        qk_nope_head_dim: Size,
        qk_rope_head_dim: Size,
        v_head_dim: Size,
        q_lora_rank: Size | None = None,
        softmax_scale: float | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
        dropout: float = 0.0,
        layer_idx: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.layer_idx, self.dropout = num_heads, layer_idx, dropout
        self.kv_lora_rank, self.q_lora_rank = kv_lora_rank, q_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = self.qk_head_dim**-0.5 if softmax_scale is None else softmax_scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, num_heads * self.qk_head_dim, bias=False, **factory)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank, bias=bias, **factory)
            self.q_a_layernorm = RMSNorm(q_lora_rank, norm_eps, **factory)
            self.q_b_proj = Linear(q_lora_rank, num_heads * self.qk_head_dim, bias=False, **factory)
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias, **factory)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, norm_eps, **factory)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False, **factory)
        self.o_proj = Linear(num_heads * v_head_dim, hidden_size, bias=bias, **factory)

    @classmethod
    @check_types
    def from_config(
        cls, config: DeepseekConfig, layer_idx: int = 0, *, device=None, dtype=None
    ) -> MultiHeadLatentAttention:
        arguments = cls.arguments(config, layer_idx, device=device, dtype=dtype)
        return cls(config.hidden_size, config.num_attention_heads, **arguments)

    @classmethod
    def arguments(cls, config: DeepseekConfig, layer_idx: int, *, device=None, dtype=None) -> dict[str, Any]:
        """Returns the keyword arguments that a config implies."""
        return {
            "kv_lora_rank": config.kv_lora_rank,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
            "q_lora_rank": config.q_lora_rank,
            "softmax_scale": config.softmax_scale,
            "norm_eps": config.latent_norm_eps,
            "bias": config.attention_bias,
            "dropout": config.attention_dropout,
            "layer_idx": layer_idx,
            "device": device,
            "dtype": dtype,
        }

    def forward(
        self,
        x: Tensor,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: Any | None = None,
    ) -> Tensor:
        """Attends and projects back.

        Args:
            x: [B, T, H], normed hidden states.
            rope: cosines and sines [B, T, R / 2] of the tokens' positions.
            mask: None for causal attention, or as `deepseek_kernels.common.masks` describes.
            cache: a `LatentCache`, or anything whose `update(latent [B, 1, T, C], rotated_key [B, 1, T, R],
                layer_idx)` returns both for all S keys (transformers' caches do).

        Returns:
            [B, T, H].
        """
        q = self.queries(x, rope)
        out = self.attend(q, self.append_to_cache(x, rope, cache), mask, cache)
        return self.o_proj(out.flatten(-2))

    def attend(
        self, q: Tensor, states: Tensor | tuple[Tensor, Tensor], mask: Tensor | None, cache: Any | None
    ) -> Tensor:
        """Attends in the cheaper form to what `append_to_cache` returned -> [B, T, N, V]."""
        absorbs = self.prefers_absorbed(q.shape[1], (states[0] if isinstance(states, tuple) else states).shape[1])
        if absorbs and not is_hooked(self.kv_b_proj):
            joined = torch.cat(states, dim=-1) if isinstance(states, tuple) else states
            return self.attend_absorbed(q, joined, mask)
        return self.attend_expanded(q, *latents_and_keys(states, cache), mask)

    def norm_consumers(self) -> tuple[nn.Module, ...]:
        """Returns the linear layers that alone read the input."""
        return (self.q_proj if self.q_lora_rank is None else self.q_a_proj), self.kv_a_proj_with_mqa

    def queries(self, x: Tensor, rope: Rotation) -> Tensor:
        """Projects x [B, T, H] to queries [B, T, N, P + R], the last R of each head rotated."""
        if self.q_lora_rank is None:
            projection = self.q_proj
            q = projection(x)
        else:
            projection = self.q_b_proj
            q = projection(normalize(self.q_a_layernorm, self.q_a_proj(x), projection))
        return self.rotated_queries(projection, q, rope)

    def rotated_queries(self, projection: nn.Module, q: Tensor, rope: Rotation) -> Tensor:
        """Returns the output of a query projection by heads, [B, T, N, P + R], the last R of each rotated."""
        # Under tensor parallelism a rank holds a share of the heads, so their number is the projection's.
        q = q.reshape(*q.shape[:2], q.shape[2] // self.qk_head_dim, self.qk_head_dim)
        # In place only where no hook may have kept the projection's output.
        own = is_plain_linear(projection) and not differentiated(q)
        return rope_(q, *rope) if own else rotate(q, *rope)

    def append_to_cache(self, x: Tensor, rope: Rotation, cache: Any | None) -> Tensor | tuple[Tensor, Tensor]:
        """Appends the tokens' latents and keys to the cache and returns all that it holds.

        Latents are cached after their norm; the rotated key is shared by all heads and not normed (TRAPS A4, B3).

        Returns:
            Of a `LatentCache`, both side by side as it stores them: [B, S, C + R], or bytes [B, S, bytes] in FP8.
            Otherwise, and without a cache, latents [B, S, C] and keys [B, S, R].
        """
        kv, norm = self.kv_a_proj_with_mqa(x), self.kv_a_layernorm
        if isinstance(cache, LatentCache) and is_plain_module(norm, RMSNorm) and not differentiated(kv, norm.weight):
            return cache.write(kv, norm.weight, norm.eps, rope, self.layer_idx)
        latent, key = norm(kv[..., : self.kv_lora_rank]), rotate(kv[..., self.kv_lora_rank :], *rope)
        if cache is None:
            return latent, key
        if isinstance(cache, LatentCache):
            return cache.update_states(torch.cat((latent, key), dim=-1), self.layer_idx)
        latents, keys = cache.update(latent[:, None], key[:, None], self.layer_idx)
        return latents[:, 0], keys[:, 0]

    def latents_and_keys(self, x: Tensor, rope: Rotation, cache: Any | None) -> tuple[Tensor, Tensor]:
        """Returns latents [B, S, C] and rotated keys [B, S, R] of all tokens, after `append_to_cache`."""
        return latents_and_keys(self.append_to_cache(x, rope, cache), cache)

    def prefers_absorbed(self, queries: int, keys: int) -> bool:
        """Returns True if the absorbed form costs fewer multiplications for T queries on S keys.

        Per head, expanding costs (P + V) C a key, absorbing the same a query; attending costs 2 max(P + R, V) a pair
        expanded and 2 (C + R) absorbed (both after padding keys and values to one width). V3: absorbed up to about 170
        queries on a long cache, never without one.
        """
        if self.training and self.dropout > 0:
            return False  # the absorbed form has no dropout
        form = (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
        extra = 2 * (self.kv_lora_rank + self.qk_rope_head_dim - max(self.qk_head_dim, self.v_head_dim))
        return queries * form + queries * keys * extra < keys * form

    def attend_expanded(self, q: Tensor, latents: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Attends with per-head keys and values -> [B, T, N, V]."""
        dropout = self.dropout if self.training else 0.0
        return mla_attention(q, self.expand(latents), keys, self.softmax_scale, mask, dropout)

    def expand(self, latents: Tensor) -> Tensor:
        """Expands latents [B, S, C] to each head's unrotated keys, then its values: [B, S, N, P + V]."""
        return self.kv_b_proj(latents).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))

    def attend_absorbed(self, q: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Attends to the latents themselves, keys and values being the same [B, S, C + R] -> [B, T, N, V].

        `states` may also be the bytes [B, S, bytes] of an FP8 cache.
        """
        return self.absorbed(q, lambda q: mla_decode(q, states, self.kv_lora_rank, self.softmax_scale, mask))

    def absorbed(self, q: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Runs `attend` in the space of the latents.

        Args:
            q: [B, T, N, P + R].
            attend: queries [B, T, N, C + R] -> weighted latents [B, T, N, C].

        Returns:
            [B, T, N, V].
        """
        split, shape = self.qk_nope_head_dim, (q.shape[2], self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)
        # A layer in high precision, which most are, need not be asked; nor looked up, which nn.Module does by a call.
        kept = None if self._modules["kv_b_proj"].__class__ is Linear else fp8_weight(self.kv_b_proj)
        if kept is not None and reads_codes(q, codes := kept[0].view(shape)):
            latents = attend(queries_to_latents(q, codes, split, *kept[1:]))
            return latents_to_values(latents, codes, split, *kept[1:])
        weight, bias = self.kv_b_map(q)
        up = weight.view(shape)  # [N, P + V, C]
        out = latents_to_values(attend(queries_to_latents(q, up, split)), up, split)
        # A bias of the keys adds the same to all scores of a query, which the softmax takes out again.
        return out if bias is None else out + bias.view(q.shape[2], -1)[:, split:]

    def kv_b_map(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the matrix [N (P + V), C] and the bias [N (P + V)] of `kv_b_proj`, whatever kind of module it is.

        Only a plain linear layer is asked for its weight; it has no bias. An adapter, another quantized layer, an
        offloaded layer or a sharded parameter computes something else, so the module is applied to the unit vectors and
        to zero. What a hook makes of them is not known: `forward` expands there.

        Args:
            like: activations, whose dtype and device the unit vectors get: parameters may be elsewhere.
        """
        weight = dense_weight(self.kv_b_proj, like.dtype)
        if weight is not None:
            return weight, None
        probes = torch.eye(self.kv_lora_rank + 1, self.kv_lora_rank, device=like.device, dtype=like.dtype)
        out = self.kv_b_proj(probes)
        return (out[:-1] - out[-1]).T, out[-1]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, softmax_scale={self.softmax_scale:.6g}, layer_idx={self.layer_idx}"


def is_hooked(module: nn.Module) -> bool:
    """Returns True for a module with hooks of its own: they may tell rows apart (PEFT's mixed batches), or record."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def latents_and_keys(states: Tensor | tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Tensor]:
    """Returns latents [B, S, C] and rotated keys [B, S, R] of what `append_to_cache` returned."""
    return states if isinstance(states, tuple) else cache.split(states)


def differentiated(*tensors: Tensor) -> bool:
    """Returns True if a derivative of these is needed, backward or forward: then nothing may be written in place."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False
