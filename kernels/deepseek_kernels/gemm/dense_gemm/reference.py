"""Half-precision products on a CPU that has none: float32 products of expanded blocks of the weight.

Block by block, because a float32 copy of the whole weight would double the model's memory for a moment and come from
fresh pages every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P, _T = ParamSpec("_P"), TypeVar("_T")
MIN_ROWS = 16  # below, the built-in's row-by-row dot products are as fast (measured on AVX2)
_BLOCK = 512  # weight rows expanded at a time: 4 MB of float32 at K = 2048


def _as_written(product: Callable[_P, _T]) -> Callable[_P, _T]:
    """Autocast reaches into custom operators, and would round the float32 operands back to the dtype that is slow."""

    @functools.wraps(product)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.autocast("cpu", enabled=False):
            return product(*args, **kwargs)

    return run


@_as_written
def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] @ [N, K].T -> [M, N] in `x.dtype`, for half-precision operands."""
    wide = x.float()
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out[:, rows] = wide @ weight[rows].float().T
    return out


@_as_written
def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """[M, N] @ [N, K] -> [M, K] in `grad.dtype`, accumulated in float32."""
    out = torch.zeros(grad.shape[0], weight.shape[1], dtype=torch.float32, device=grad.device)
    for start in range(0, weight.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out.addmm_(grad[:, rows].float(), weight[rows].float())
    return out.to(grad.dtype)


@_as_written
def weight_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """`out` [N, K] = [M, N].T @ [M, K], accumulated in float32, rounded once."""
    wide = x.float()
    for start in range(0, grad.shape[1], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out[rows] = grad[:, rows].float().T @ wide


# A custom operator rather than an autograd.Function: opaque to torch.compile, so that compiled code takes the same
# path instead of the slow product that the blocks are there to avoid.
@torch.library.custom_op("deepseek_kernels::dense_gemm_expanded", mutates_args=())
def dense_gemm_expanded(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(x, weight)


@dense_gemm_expanded.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("deepseek_kernels::dense_gemm_expanded_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = input_gradient(grad, weight) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    if need_weight:
        weight_gradient(grad, x, grad_weight)
    return grad_x, grad_weight


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad
    grad_x, grad_weight = _backward(grad, x, weight, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None


dense_gemm_expanded.register_autograd(_differentiate, setup_context=_setup)
