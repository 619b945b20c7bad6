"""Grouped product in PyTorch: a loop over the experts that own rows, each reading its weight in place."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...common import half_products
from ...common.autograd import connect_product
from ...common.float32_products import by_onednn, product

__all__ = ["grouped_gemm_reference"]


def _groups(ends: Tensor) -> list[slice]:
    """Returns the rows of each expert, then the unassigned ones."""
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist(), None])]


# Custom operators, because the loops' bounds are data: torch.compile sees opaque nodes. No element that a product
# writes is zeroed before: the weights' gradient is as large as all experts.
@torch.library.custom_op("deepseek_kernels::grouped_gemm", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    expands = half_products.expands(x)
    *groups, unassigned = _groups(ends)
    for expert, rows in enumerate(groups):
        if count := rows.stop - rows.start:
            multiply = half_products.multiply if expands and count >= half_products.MIN_ROWS else product
            out[rows] = multiply(x[rows], weight[expert])
    out[unassigned] = 0
    return out


@torch.library.custom_op("deepseek_kernels::grouped_gemm_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    *groups, unassigned = _groups(ends)
    grad_x, grad_weight = x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)
    if need_x:
        _input_gradient(grad, weight, groups, grad_x)
        grad_x[unassigned] = 0
    if need_weight:
        _weight_gradient(grad, x, groups, grad_weight)
    return grad_x, grad_weight


def _input_gradient(grad: Tensor, weight: Tensor, groups: list[slice], out: Tensor) -> None:
    expands = half_products.expands(grad)
    for expert, rows in enumerate(groups):
        if rows.stop == rows.start:
            continue
        if expands:
            out[rows] = half_products.input_gradient(grad[rows], weight[expert])
        else:
            out[rows] = product(grad[rows], weight[expert].T)


def _weight_gradient(grad: Tensor, x: Tensor, groups: list[slice], out: Tensor) -> None:
    expands = half_products.expands(grad)
    for expert, rows in enumerate(groups):
        if rows.stop == rows.start:
            out[expert] = 0  # an expert without rows has a gradient, and it is zero (TRAPS C15)
        elif expands:
            half_products.weight_gradient(grad[rows], x[rows], out[expert])
        elif by_onednn(grad[rows].T, x[rows].T):
            out[expert] = product(grad[rows].T, x[rows].T)
        else:
            torch.mm(grad[rows].T, x[rows], out=out[expert])


grouped_gemm_reference = connect_product(_product, _backward)
