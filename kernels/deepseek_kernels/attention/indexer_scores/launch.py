"""Launches the kernels of `indexer_scores`: custom operators, opaque to torch.compile, and their derivative.

Nothing here looks at values on the device, so that everything can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.host import cdiv, family, power_of_two, processors, rows_readable
from ...common.masks import kernel_arguments
from ..packed_index_keys import index_key_views
from . import backward, kernel
from .configs import KEY_GRADIENT, QUERY_GRADIENT, chunk_for, config_for, gradient_config, parts_for, places_of

__all__ = ["scores", "scores_backward"]


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
            **_scales(keys, q.shape[3]),
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


@torch.library.custom_op("deepseek_kernels::indexer_scores_backward", mutates_args=())
def scores_backward(
    grad: Tensor, q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None, need_q: bool, need_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, weights and keys; an empty tensor in place of those that are not needed."""
    q_grad, weights_grad, keys_grad = _gradients(grad, q, keys, weights, mask, need_q, need_keys)
    if not (q.numel() and keys.numel()):
        return q_grad.zero_(), weights_grad.zero_(), keys_grad.zero_()
    grad, (batch, queries, heads, width), count = rows_readable(grad), q.shape, keys.shape[1]
    operands = {**_operands(q, keys, weights, mask), "grad": grad, "grad_strides": grad.stride()[:2]}
    with torch.cuda.device_of(q):
        if need_q:
            config = gradient_config(QUERY_GRADIENT, q.dtype, family(q.device))
            places = places_of(queries, heads, config)
            results = {"q_grad": q_grad, "weights_grad": weights_grad}
            backward.query_gradient_kernel[(batch * cdiv(queries, places["QUERIES"]),)](
                **operands, **results, **places, **config.blocks, **config.options
            )
        if need_keys:
            config = gradient_config(KEY_GRADIENT, q.dtype, family(q.device))
            programs = batch * cdiv(count, config.keys)
            parts = parts_for(programs, queries, config, processors(q.device))
            sums = torch.empty(batch, parts, count, width, dtype=torch.float32, device=q.device)
            backward.key_gradient_kernel[(programs * parts,)](
                **operands,
                **{"key_grads": sums, "parts": parts},
                **places_of(queries, heads, config),
                **config.blocks,
                **config.options,
            )
            keys_grad.copy_(sums.sum(1) if parts > 1 else sums[:, 0])
    return q_grad, weights_grad, keys_grad


@scores_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None, need_q: bool, need_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if need_q else 0),
        weights.new_empty(weights.shape if need_q else 0),
        keys.new_empty(keys.shape if need_keys else 0),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_q, need_keys, need_weights, _ = ctx.needs_input_grad
    q_grad, weights_grad, keys_grad = scores_backward(grad, *ctx.saved_tensors, need_q or need_weights, need_keys)
    return q_grad if need_q else None, keys_grad if need_keys else None, weights_grad if need_weights else None, None


scores.register_autograd(_differentiate, setup_context=_save)


def _operands(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Returns the arguments that all kernels have in common."""
    (batch, queries, heads, width), count = q.shape, keys.shape[1]
    q, keys, weights = rows_readable(q), rows_readable(keys), rows_readable(weights)
    token = keys.stride(1)
    if keys.dtype == torch.uint8:
        keys = index_key_views(keys, width)[0]
    return {
        **{"q": q, "keys": keys, "weights": weights, "queries": queries, "count": count},
        **{"q_strides": q.stride()[:3], "key_stride": keys.stride(0), "weight_strides": weights.stride()[:2]},
        **kernel_arguments(mask, batch, queries, count),
        # Products of 8-bit numbers take 32 columns at least.
        **{"TOKEN": token, "HEADS": heads, "WIDTH": width, "COLUMNS": max(32, power_of_two(width))},
    }


def _scales(keys: Tensor, width: int) -> dict[str, Any]:
    """Returns the argument `scales`, of packed keys."""
    return {"scales": index_key_views(keys, width)[1] if keys.dtype == torch.uint8 else None}
