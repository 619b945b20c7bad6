"""`indexer_scores`: the lightning indexer's score of each query and key (DeepSeek-V3.2 report, equation 1).

    score[t, s] = sum over heads g of weight[t, g] * ReLU(q[t, g] . key[s])

All heads share one key. Queries and keys come in high precision, or both in FP8 as DeepSeek runs it.

B batch, T queries, S keys, G heads of the indexer, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.masks import check_visibility
from ..packed_index_keys import index_keys_aligned, packed_index_bytes
from . import cpu, reference
from .configs import MOST_HEADS, MOST_WIDTH

__all__ = ["indexer_scores"]

dispatch.register("indexer_scores", "triton", "cpu")
# The same kernel on FP8 operands. 8.9: the first with products of e4m3.
dispatch.register("indexer_scores_fp8", "triton", "cpu", capability=(8, 9))

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


def indexer_scores(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores every key for every query.

    Products and sums are in float32, of operands as they are: no score is rounded to 16 bits, which would make equals
    of different keys. With FP8 operands the score of a key is the sum over heads times the key's scale; scales of the
    queries are the caller's, multiplied into `weights`.

    Args:
        q: [B, T, G, D], bfloat16, float16, float32 (float64 on the reference); or float8_e4m3fn.
        keys: [B, S, D] of q's dtype; with FP8 queries uint8 [B, S, bytes] from `pack_index_keys`, D at most 128.
        weights: [B, T, G] float32 (float64 with float64 queries), scales and factors included; may be negative.
        mask: None for causal, spans or bool, as `deepseek_kernels.common.masks` describes; not additive.

    Returns:
        [B, T, S] float32 (float64 with float64 queries), -inf where a query does not see a key. Differentiable in q,
        keys and weights that are not FP8, by the kernels without storing a product. The reference's extra memory is a
        fixed number of (query, key, head) triples, never all of them, unless a gradient is needed.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    _check(q, keys, weights)
    check_visibility(mask, q.shape[0], q.shape[1], keys.shape[1])
    packed = keys.dtype == torch.uint8
    op = "indexer_scores_fp8" if packed else "indexer_scores"
    chosen = dispatch.pick(op, q.device, _unsupported(q, keys, weights))
    if chosen == "cpu" and cpu.takes(q, keys, weights):
        return cpu.scores(q, keys, weights, mask)
    if chosen != "triton":
        return reference.scores(q, keys, weights, mask)
    from . import launch

    return launch.scores(q, keys, weights, mask)


def _check(q: Tensor, keys: Tensor, weights: Tensor) -> None:
    if q.ndim != 4 or not q.dtype.is_floating_point:
        raise ValueError(f"expected floating-point q [B, T, G, D], got {q.dtype} {list(q.shape)}")
    batch, queries, heads, width = q.shape
    packed = q.dtype == torch.float8_e4m3fn
    if packed and width > 128:
        raise ValueError(f"expected FP8 heads of at most 128 values, one scale each, got {width}")
    dtype, columns = (torch.uint8, packed_index_bytes(width)) if packed else (q.dtype, width)
    if keys.ndim != 3 or keys.shape[0] != batch or keys.shape[2] != columns or keys.dtype != dtype:
        raise ValueError(
            f"expected keys {dtype} [{batch}, S, {columns}] with {q.dtype} queries, got {keys.dtype} {list(keys.shape)}"
        )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if weights.shape != (batch, queries, heads) or weights.dtype != wide:
        raise ValueError(
            f"expected weights {wide} [{batch}, {queries}, {heads}], got {weights.dtype} {list(weights.shape)}"
        )


def _unsupported(q: Tensor, keys: Tensor, weights: Tensor) -> str | None:
    """Returns the reason why the kernels cannot take these operands, or None."""
    heads, width = q.shape[2:]
    if q.dtype not in _DTYPES:
        return f"its queries are bfloat16, float16, float32 or float8_e4m3fn, got {q.dtype}"
    if keys.dtype == torch.uint8 and torch.is_grad_enabled() and weights.requires_grad:
        return "it has no gradient with FP8 operands"
    if not 1 <= heads <= MOST_HEADS or not 1 <= width <= MOST_WIDTH:
        return f"it has 1 to {MOST_HEADS} heads of 1 to {MOST_WIDTH} values, got {heads} of {width}"
    if keys.dtype == torch.uint8 and not index_keys_aligned(keys, width):
        return f"its packed keys begin at multiples of 4 bytes and so do their scales, got strides {keys.stride()}"
    return None
