"""Launches the kernels of `topk_gate`: a custom operator, opaque to torch.compile, and its derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.host import cdiv, power_of_two, rows_readable
from . import kernel
from .configs import places_of, tokens_of

__all__ = ["topk_gate"]


@torch.library.custom_op("deepseek_kernels::topk_gate", mutates_args=())
def topk_gate(
    scores: Tensor, bias: Tensor | None, top_k: int, groups: Sequence[int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    weights, ids = _new(scores, bias, top_k, groups, normalize, factor)
    tokens, experts = scores.shape
    if not tokens:
        return weights, ids
    n_group, topk_group, group_best = groups
    scores, places = rows_readable(scores), places_of(experts, n_group, topk_group)
    count = tokens_of(tokens, places["GROUP_BLOCK"] * places["WIDTH"])
    with torch.cuda.device_of(scores):
        kernel.gate_kernel[(cdiv(tokens, count),)](
            *(scores, scores if bias is None else bias.contiguous(), weights, ids, tokens, scores.stride(0), factor),
            EXPERTS=experts,
            TOP_K=top_k,
            BEST=group_best,
            BIASED=bias is not None,
            NORMALIZE=normalize,
            SLOTS=power_of_two(top_k),
            **places,
            TOKENS=count,
            num_warps=1,
            enable_fp_fusion=False,  # the reference has none
        )
    return weights, ids


@topk_gate.register_fake
def _new(
    scores: Tensor, bias: Tensor | None, top_k: int, groups: Sequence[int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("deepseek_kernels::topk_gate_backward", mutates_args=())
def _backward(grad: Tensor, scores: Tensor, ids: Tensor, normalize: bool, factor: float) -> Tensor:
    grad_scores = _new_gradient(grad, scores, ids, normalize, factor)
    (tokens, experts), top_k = scores.shape, ids.shape[1]
    if not tokens:
        return grad_scores
    grad, scores, width = grad.contiguous(), rows_readable(scores), power_of_two(experts)
    count = tokens_of(tokens, width)
    with torch.cuda.device_of(scores):
        kernel.backward_kernel[(cdiv(tokens, count),)](
            *(grad, scores, ids, grad_scores, tokens, scores.stride(0), factor),
            EXPERTS=experts,
            TOP_K=top_k,
            NORMALIZE=normalize,
            WIDTH=width,
            SLOTS=power_of_two(top_k),
            TOKENS=count,
            num_warps=1,
        )
    return grad_scores


@_backward.register_fake
def _new_gradient(grad: Tensor, scores: Tensor, ids: Tensor, normalize: bool, factor: float) -> Tensor:
    return scores.new_empty(scores.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.normalize, ctx.factor = inputs[4:]


def _differentiate(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    scores, ids = ctx.saved_tensors
    return _backward(grad, scores, ids, ctx.normalize, ctx.factor), *[None] * 5


topk_gate.register_autograd(_differentiate, setup_context=_save)
