"""Shapes and dtypes of the C++ operators' results, for torch.compile and meta tensors, and their derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]


def register() -> None:
    """Tells torch about them, once the library is loaded."""
    for fake in _FAKES:
        torch.library.register_fake(f"deepseek_kernels_cpu::{fake.__name__[1:]}", fake)
    attention = "deepseek_kernels_cpu::mla_attention"
    torch.library.register_autograd(attention, _attention_gradients, setup_context=_save_attention)


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fp8_weight(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    block_rows: int = 1,
    block_columns: int = 1,
) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[1])


def _combine(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    return y.new_empty(inverse.shape[0], y.shape[1])


def _combine_backward(grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=torch.promote_types(total.dtype, weight.dtype)), total


def _topk_gate(
    scores: Tensor, bias: Tensor | None, top_k: int, groups: list[int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def _latent_write(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    return None


def _mla_decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


def _mla_decode_paged(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


def _mla_prefill(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


def _sparse_mla(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


def _queries_to_latents(
    q: Tensor,
    up: Tensor,
    own: int,
    scale: Tensor | None = None,
    block_rows: int = 1,
    block_columns: int = 1,
) -> Tensor:
    return q.new_empty(*q.shape[:3], up.shape[2] + q.shape[3] - own)


def _latents_to_values(
    latents: Tensor,
    up: Tensor,
    own: int,
    scale: Tensor | None = None,
    block_rows: int = 1,
    block_columns: int = 1,
) -> Tensor:
    return latents.new_empty(*latents.shape[:3], up.shape[1] - own)


def _indexer_scores(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights.new_empty(*q.shape[:2], keys.shape[1])


def _topk_select(scores: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    return scores.new_empty(*scores.shape[:2], min(top_k, scores.shape[2]), dtype=torch.int32)


def _mla_attention(q: Tensor, kv: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    out = q.new_empty(batch, queries, heads, kv.shape[3] - width + key.shape[2])
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _mla_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), key.new_empty(key.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, key, mask, ctx.scale = inputs
    ctx.save_for_backward(q, kv, key, mask, *output)
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    backward = torch.ops.deepseek_kernels_cpu.mla_attention_backward
    return *backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_FAKES = (
    _dense,
    _fp8_weight,
    _experts,
    _combine,
    _combine_backward,
    _rms_norm,
    _topk_gate,
    _latent_write,
    _mla_decode,
    _mla_decode_paged,
    _mla_prefill,
    _sparse_mla,
    _queries_to_latents,
    _latents_to_values,
    _indexer_scores,
    _topk_select,
    _mla_attention,
    _mla_attention_backward,
)
