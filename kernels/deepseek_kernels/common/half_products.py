"""Products of 16-bit floats on a CPU that has none: float32 products of expanded blocks of the weight.

Block by block, because a float32 copy of the whole weight would double the model's memory for a moment and come from
fresh pages every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import dispatch
from .float32_products import product

__all__ = ["HALF", "MIN_ROWS", "add_weight_gradient", "expands", "input_gradient", "multiply", "weight_gradient"]

P = ParamSpec("P")
T = TypeVar("T")

HALF = (torch.bfloat16, torch.float16)
MIN_ROWS = 16  # below, the built-in's row-by-row dot products are as fast (measured on AVX2)
_BLOCK = 512  # weight rows expanded at a time: 4 MB of float32 at K = 2048


def expands(x: Tensor) -> bool:
    """Tells if products of x are to be computed here, whatever their number of rows."""
    return x.dtype in HALF and x.device.type == "cpu" and not dispatch.native_half_matmul(x.dtype)


def _outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Autocast reaches into custom operators, and would round the float32 operands back to the dtype that is slow."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


@_outside_autocast
def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] @ [N, K].T -> [M, N] in `x.dtype`, for half-precision operands."""
    wide = x.float()
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out[:, rows] = product(wide, weight[rows].float())
    return out


@_outside_autocast
def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """[M, N] @ [N, K] -> [M, K] in `grad.dtype`, accumulated in float32."""
    out = torch.zeros(grad.shape[0], weight.shape[1], dtype=torch.float32, device=grad.device)
    for start in range(0, weight.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out.addmm_(grad[:, rows].float(), weight[rows].float())
    return out.to(grad.dtype)


@_outside_autocast
def weight_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """`out` [N, K] = [M, N].T @ [M, K], accumulated in float32, rounded once."""
    wide = x.float()
    for start in range(0, grad.shape[1], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out[rows] = product(grad[:, rows].float().T, wide.T)


@_outside_autocast
def add_weight_gradient(grad: Tensor, x: Tensor, out: Tensor) -> None:
    """`out` [N, K] float32 += [M, N].T @ [M, K], never rounded."""
    wide = x.float()
    for start in range(0, out.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        out[rows].addmm_(grad[:, rows].float().T, wide)
