"""Dense product of 16-bit floats on a CPU that has none: a differentiable custom operator on expanded blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.autograd import connect_product
from ...common.half_products import input_gradient, multiply, weight_gradient

__all__ = ["dense_gemm_expanded"]


# A custom operator rather than an autograd.Function: opaque to torch.compile, so that compiled code takes the same
# path instead of the slow product that the blocks are there to avoid.
@torch.library.custom_op("deepseek_kernels::dense_gemm_expanded", mutates_args=())
def _product(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(x, weight)


@torch.library.custom_op("deepseek_kernels::dense_gemm_expanded_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = input_gradient(grad, weight) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    if need_weight:
        weight_gradient(grad, x, grad_weight)
    return grad_x, grad_weight


dense_gemm_expanded = connect_product(_product, _backward)
