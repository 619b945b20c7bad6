"""Launches the kernels of `indexer_scores`: a custom operator, opaque to torch.compile.

Nothing here looks at values on the device, so that everything can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.host import cdiv, family, power_of_two, processors, rows_readable
from ...common.masks import kernel_arguments
from ..packed_index_keys import index_key_views
from . import kernel
from .configs import chunk_for, config_for, places_of

__all__ = ["scores"]


@torch.library.custom_op("deepseek_kernels::indexer_scores", mutates_args=())
def scores(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    out = _new(q, keys, weights, mask)
    (batch, queries, heads, _), count = q.shape, keys.shape[1]
    if not out.numel():
        return out
    config = config_for(queries, heads, q.dtype, family(q.device))
    places = places_of(queries, heads, config)
    blocks = batch * cdiv(queries, places["QUERIES"])
    chunk = chunk_for(blocks, count, config, processors(q.device))
    with torch.cuda.device_of(q):
        kernel.scores_kernel[(blocks * cdiv(count, chunk),)](
            **_operands(q, keys, weights, mask),
            out=out,
            chunk=chunk,
            **places,
            **config.blocks,
            **config.options,
        )
    return out


@scores.register_fake
def _new(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights.new_empty(*q.shape[:2], keys.shape[1])


def _operands(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Returns the arguments that all kernels have in common."""
    (batch, queries, heads, width), count = q.shape, keys.shape[1]
    q, keys, weights, scales = rows_readable(q), rows_readable(keys), rows_readable(weights), None
    token = keys.stride(1)
    if keys.dtype == torch.uint8:
        keys, scales = index_key_views(keys, width)
    return {
        **{"q": q, "keys": keys, "scales": scales, "weights": weights, "queries": queries, "count": count},
        **{"q_strides": q.stride()[:3], "key_stride": keys.stride(0), "weight_strides": weights.stride()[:2]},
        **kernel_arguments(mask, batch, queries, count),
        # Products of 8-bit numbers take 32 columns at least.
        **{"TOKEN": token, "HEADS": heads, "WIDTH": width, "COLUMNS": max(32, power_of_two(width))},
    }
