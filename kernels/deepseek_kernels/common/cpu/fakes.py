"""Shapes and dtypes of the C++ operators' results, for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["register"]


def register() -> None:
    """Tells torch about them, once the library is loaded."""
    for fake in (_dense, _fp8_weight, _experts, _rms_norm, _topk_gate, _latent_write, _mla_decode, _mla_decode_paged):
        torch.library.register_fake(f"deepseek_kernels_cpu::{fake.__name__[1:]}", fake)


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
