"""Permutation by expert and weighted combination, whose sums C++ takes: no float32 copy of any row is in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...common.cpu import observed
from .reference import sort_by_expert

__all__ = ["permute", "sort_by_expert", "takes", "unpermute"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(rows: Tensor, weights: Tensor | None, *ids: Tensor) -> bool:
    """Returns True if the C++ operators are made for these operands; all others are the reference's."""
    if rows.dtype not in _DTYPES or (weights is not None and weights.dtype != torch.float32):
        return False
    return not observed(rows, *ids) and (weights is None or not observed(weights))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, torch.div(order, inverse.shape[1], rounding_mode="floor"))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return torch.ops.deepseek_kernels_cpu.combine(grad, None, inverse), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, inverse):
        ctx.save_for_backward(y, weights, inverse)
        return torch.ops.deepseek_kernels_cpu.combine(y, weights, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.deepseek_kernels_cpu.combine_backward(grad, *ctx.saved_tensors)
        return *(one if need else None for one, need in zip(grads, ctx.needs_input_grad, strict=False)), None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """See `permute`."""
    return _Permute.apply(x, order, inverse)


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """See `unpermute`."""
    return _Unpermute.apply(y, weights, inverse)
