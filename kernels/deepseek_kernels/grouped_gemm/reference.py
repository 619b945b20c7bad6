"""Grouped product in PyTorch: a loop over the experts that own rows, each reading its weight in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..dense_gemm import reference as dense

__all__ = ["grouped_gemm_reference"]


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _expands(x: Tensor) -> bool:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.device.type == "cpu" and not dispatch.native_half_matmul()


# A custom operator, because the loop's bounds are data: torch.compile sees one opaque node.
@torch.library.custom_op("deepseek_kernels::grouped_gemm", mutates_args=())
def grouped_gemm_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    expands = _expands(x)
    for expert, rows in _groups(ends):
        many = expands and rows.stop - rows.start >= dense.MIN_ROWS
        out[rows] = dense.multiply(x[rows], weight[expert]) if many else F.linear(x[rows], weight[expert])
    return out


@grouped_gemm_reference.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("deepseek_kernels::grouped_gemm_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    # Zeros, not empty: an expert that owns no row has a gradient, and it is zero.
    grad_weight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    expands = _expands(x)
    for expert, rows in _groups(ends):
        if need_x:
            grad_x[rows] = dense.input_gradient(grad[rows], weight[expert]) if expands else grad[rows] @ weight[expert]
        if need_weight and expands:
            dense.weight_gradient(grad[rows], x[rows], grad_weight[expert])
        elif need_weight:
            torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
    return grad_x, grad_weight


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    x, weight, ends = ctx.saved_tensors
    need_x, need_weight, _ = ctx.needs_input_grad
    grad_x, grad_weight = _backward(grad.contiguous(), x, weight, ends, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None


grouped_gemm_reference.register_autograd(_differentiate, setup_context=_setup)
