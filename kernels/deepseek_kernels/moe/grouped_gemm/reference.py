"""Grouped product in PyTorch: a loop over the experts that own rows, each reading its weight in place."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import dispatch
from ...gemm.dense_gemm import reference as dense
from .backward import connect

__all__ = ["grouped_gemm_reference"]


def _groups(ends: Tensor) -> list[slice]:
    """The rows of each expert, then those of nobody."""
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist(), None])]


def _expands(x: Tensor) -> bool:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.device.type == "cpu" and not dispatch.native_half_matmul()


# Custom operators, because the loops' bounds are data: torch.compile sees opaque nodes. Nothing is zeroed that a
# product writes: the weights' gradient is as large as all experts.
@torch.library.custom_op("deepseek_kernels::grouped_gemm", mutates_args=())
def grouped_gemm_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    expands = _expands(x)
    *groups, nobody = _groups(ends)
    for expert, rows in enumerate(groups):
        if count := rows.stop - rows.start:
            multiply = dense.multiply if expands and count >= dense.MIN_ROWS else F.linear
            out[rows] = multiply(x[rows], weight[expert])
    out[nobody] = 0
    return out


@torch.library.custom_op("deepseek_kernels::grouped_gemm_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    *groups, nobody = _groups(ends)
    grad_x, grad_weight = x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)
    if need_x:
        _input_gradient(grad, weight, groups, grad_x)
        grad_x[nobody] = 0
    if need_weight:
        _weight_gradient(grad, x, groups, grad_weight)
    return grad_x, grad_weight


def _input_gradient(grad: Tensor, weight: Tensor, groups: list[slice], out: Tensor) -> None:
    multiply = dense.input_gradient if _expands(grad) else torch.mm
    for expert, rows in enumerate(groups):
        if rows.stop > rows.start:
            out[rows] = multiply(grad[rows], weight[expert])


def _weight_gradient(grad: Tensor, x: Tensor, groups: list[slice], out: Tensor) -> None:
    expands = _expands(grad)
    for expert, rows in enumerate(groups):
        if rows.stop == rows.start:
            out[expert] = 0  # an expert without rows has a gradient, and it is zero (TRAPS C15)
        elif expands:
            dense.weight_gradient(grad[rows], x[rows], out[expert])
        else:
            torch.mm(grad[rows].T, x[rows], out=out[expert])


connect(grouped_gemm_reference, _backward)
