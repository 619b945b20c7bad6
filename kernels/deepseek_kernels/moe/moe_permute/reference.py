"""Permutation by expert and weighted combination, in gathers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["permute", "sort_by_expert", "unpermute"]


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = expert_ids.flatten()
    order = torch.sort(flat, stable=True).indices  # [T * K]
    rows = torch.arange(flat.numel(), device=flat.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows).view_as(expert_ids)  # [T, K]
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # integers: the order of additions does not matter
    return order, inverse, counts[:num_experts].cumsum(0)


def _gather(x: Tensor, order: Tensor, choices: int) -> Tensor:
    """Row `order // K` of x for every sorted row: [T, H] -> [T * K, H]."""
    return x.index_select(0, torch.div(order, choices, rounding_mode="floor"))


def _combine(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """Sum over choices of (weighted) sorted rows: [T * K, H] -> [T, H], one choice at a time, in float32 at least."""
    wide = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros(inverse.shape[0], y.shape[1], dtype=wide, device=y.device)
    for choice in range(inverse.shape[1]):
        rows = y.index_select(0, inverse[:, choice]).to(wide)  # a copy: it may be written
        total += rows if weights is None else rows.mul_(weights[:, choice, None])
    return total.to(y.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return _gather(x, order, inverse.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return _combine(grad, None, inverse), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, order, inverse):
        ctx.save_for_backward(y, weights, order, inverse)
        return _combine(y, weights, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, weights, order, inverse = ctx.saved_tensors
        spread = _gather(grad, order, inverse.shape[1])  # [T * K, H], the token's gradient at each of its rows
        row_weights = weights.flatten().index_select(0, order)
        grad_y = (spread * row_weights[:, None]).to(y.dtype) if ctx.needs_input_grad[0] else None
        grad_weights = None
        if ctx.needs_input_grad[1]:
            dots = (spread.to(weights.dtype) * y.to(weights.dtype)).sum(-1)  # [T * K]
            grad_weights = dots.index_select(0, inverse.flatten()).view_as(weights)
        return grad_y, grad_weights, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _Permute.apply(x, order, inverse)


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _Unpermute.apply(y, weights, order, inverse)
