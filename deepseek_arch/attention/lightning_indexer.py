"""The lightning indexer of DeepSeek sparse attention (V3.2 report, section 2.1): it selects the keys of each query.

A few light heads score every key, I[t, s] = sum over heads of w[t, g] ReLU(q[t, g] . k[s]) (TRAPS G1), and a query
attends to the `top_k` keys with the best scores. Queries are made from the normed query latent (TRAPS G3), the one key
of a token from the hidden state.

Notation: B batch, T queries, S keys, H hidden_size, Q q_lora_rank, G heads of the indexer, D their width, R rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_kernels import hadamard_quantize, indexer_scores, topk_select
from deepseek_kernels.attention.packed_index_keys import pack_index_keys
from deepseek_kernels.common.masks import is_spans

from ..config.argument_types import Size, check_types
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import Linear
from ..layers.rope import Rotation, rotate_first

__all__ = ["KeyNorm", "LightningIndexer", "QueryBlock", "query_blocks"]

_SCORES = 2**22  # of a block of queries, over all rows of the batch: 16 MB


class KeyNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, in float32 whatever the dtype of its input (TRAPS B2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes [..., D], rounded to the dtype of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return normed.to(x.dtype)


class WideLinear(Linear):
    """Linear layer that computes in float32, of inputs and weights in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies [..., in_features] by the weight -> [..., out_features] float32."""
        kind, wide = x.device.type, torch.promote_types(x.dtype, torch.float32)
        rows, weight = x.to(wide), self.weight.to(wide)
        if kind != "meta" and torch.is_autocast_enabled(kind):  # it would take the product down to 16 bits
            with torch.autocast(kind, enabled=False):
                return F.linear(rows, weight)
        return F.linear(rows, weight)


@check_types
class LightningIndexer(nn.Module):
    """Scores keys for queries, and selects the best.

    Args:
        num_heads, head_dim: G and D, of which the first R columns are rotated.
        top_k: keys of a query.
        rope_interleaved: rotary pairs are neighbours (GLM-5) instead of half a rotary width apart (TRAPS A3).
    """

    def __init__(
        self,
        hidden_size: Size,
        q_lora_rank: Size,
        num_heads: Size,
        head_dim: Size,
        top_k: Size,
        *,
        rope_interleaved: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.top_k = num_heads, head_dim, top_k
        self.rope_interleaved = rope_interleaved
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.wq_b = Linear(q_lora_rank, num_heads * head_dim, bias=False, **factory)
        self.wk = Linear(hidden_size, head_dim, bias=False, **factory)
        self.k_norm = KeyNorm(head_dim, eps=1e-6, **factory)
        self.weights_proj = WideLinear(hidden_size, num_heads, bias=False, **factory)

    @classmethod
    def from_config(cls, config: DeepseekConfig, *, device=None, dtype=None) -> LightningIndexer:
        sizes = config.indexer_sizes
        assert config.q_lora_rank is not None  # checked with the config
        return cls(
            config.hidden_size,
            config.q_lora_rank,
            sizes.heads,
            sizes.head_dim,
            sizes.topk,
            rope_interleaved=bool(config.indexer_rope_interleave),
            device=device,
            dtype=dtype,
        )

    def keys(self, x: Tensor, rope: Rotation, packed: bool = False) -> Tensor:
        """Returns the keys of tokens x [B, T, H] -> [B, T, D], or their bytes as `pack_index_keys` makes them."""
        keys = rotate_first(self.k_norm(self.wk(x)), rope.cos, rope.sin, self.rope_interleaved)
        return pack_index_keys(keys) if packed else keys

    def scores(self, x: Tensor, latents: Tensor, rope: Rotation, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the score of every key for each of T queries, float32 [B, T, S], -inf for keys they do not see.

        Args:
            x: [B, T, H], normed hidden states.
            latents: [B, T, Q], normed query latents.
            rope: cosines and sines [B or 1, T, R / 2].
            keys: [B, S, D], or uint8, which makes the queries FP8 too.
            mask: None (causal), spans or bool.
        """
        q = self.wq_b(latents).unflatten(-1, (self.num_heads, self.head_dim))
        q = rotate_first(q, rope.cos, rope.sin, self.rope_interleaved)  # [B, T, G, D]
        weights = self.weights_proj(x) * (self.num_heads**-0.5 * self.head_dim**-0.5)
        if keys.dtype == torch.uint8:
            rows = q.reshape(-1, self.head_dim)
            codes, scale = hadamard_quantize(rows.float() if rows.dtype == torch.float64 else rows)
            q, weights = codes.reshape(q.shape), weights.float() * scale.reshape(weights.shape)
        elif q.dtype != keys.dtype:
            keys = keys.to(q.dtype)
        return indexer_scores(q, keys, weights, mask)

    @torch.no_grad()
    def select(self, x: Tensor, latents: Tensor, rope: Rotation, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the keys of each query, int32 [B, T, K] as of `topk_select`; arguments as for `scores`.

        Scores exist for a block of queries at a time; in a program of torch.export for all of them, and K is `top_k`.
        """
        if torch.compiler.is_exporting():
            return topk_select(self.scores(x, latents, rope, keys, mask), self.top_k, mask)
        chosen = min(self.top_k, keys.shape[1])
        blocks = []
        for part in query_blocks(mask, x.shape[0], x.shape[1], keys.shape[1]):
            if part.keys <= self.top_k:  # nothing is left out, whatever the scores are
                scores = x.new_zeros(1, 1, 1, dtype=torch.float32).expand(x.shape[0], part.rows, part.keys)
            else:
                scores = self.scores(
                    x[:, part.queries], latents[:, part.queries], part.of_rope(rope), keys[:, : part.keys], part.mask
                )
            ids = topk_select(scores, self.top_k, part.mask)
            blocks.append(F.pad(ids, (0, chosen - ids.shape[-1]), value=-1))
        return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}x{self.head_dim}, top_k={self.top_k}"


class QueryBlock:
    """A block of queries, and the keys up to the last one that any of them sees.

    Attributes:
        queries: their slice; rows: how many they are.
        keys: number of keys.
        mask: of the block's queries and keys.
    """

    def __init__(self, queries: slice, keys: int, mask: Tensor | None) -> None:
        self.queries, self.rows, self.keys, self.mask = queries, queries.stop - queries.start, keys, mask

    def of_rope(self, rope: Rotation) -> Rotation:
        """Returns the block's cosines and sines."""
        cos, sin = rope
        return Rotation(cos[:, self.queries], sin[:, self.queries])


def query_blocks(
    mask: Tensor | None, batch: int, queries: int, keys: int, pairs: int = _SCORES
) -> Iterator[QueryBlock]:
    """Yields blocks of queries with `pairs` (query, key) pairs at most, over all rows of the batch.

    Args:
        mask: None (causal), spans or bool, of all T queries.
    """
    rows = max(1, pairs // max(1, batch * keys))
    for first in range(0, queries, rows):
        part = slice(first, min(first + rows, queries))
        if mask is None:
            yield QueryBlock(part, max(1, keys - queries + part.stop), None)
        elif is_spans(mask):
            spans, end = mask[:, part], keys
            # Keys that none of these queries sees are left out where their number is known without waiting.
            if mask.device.type == "cpu" and not torch.compiler.is_compiling() and rows < queries:
                end = min(keys, max(1, int(spans[..., 1].max())))
            yield QueryBlock(part, end, spans)
        else:
            dense = mask if mask.shape[-2] == 1 else mask[..., part, :]
            yield QueryBlock(part, keys, dense)
