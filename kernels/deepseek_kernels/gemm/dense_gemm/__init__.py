"""`dense_gemm`: the product of activations with a linear layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import dispatch
from ...common import float32_products
from ...common.half_products import HALF, MIN_ROWS, expands
from . import cpu
from .reference import dense_gemm_expanded

__all__ = ["dense_gemm"]

dispatch.register("dense_gemm", "cpu")


def dense_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """Computes `x @ weight.T`, with float32 accumulation, rounded once to `x.dtype`.

    Args:
        x: [..., K].
        weight: [N, K], of the same dtype.

    Returns:
        [..., N].

    On a CPU that has no products of its dtype, 16 or more rows of bfloat16 or float16 run on blocks of the weight
    expanded to float32; large products of float32 run on oneDNN where it is faster (`common.float32_products`). One to
    eight rows that need no gradient are bound by reading the weight, which the C++ operator does at the memory's speed,
    in bfloat16 and float32; it also takes some dozens of rows, for which the built-in ones pack the weight in vain.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x, weight = dispatch.autocast(x, weight)
    if dispatch.pick("dense_gemm", x.device) == "cpu" and cpu.takes(x, weight):
        return cpu.dense_gemm(x, weight)
    if x.dtype == torch.float32:
        return float32_products.product(x, weight)
    if x.dtype not in HALF or weight.dtype != x.dtype or x.numel() < MIN_ROWS * x.shape[-1] or not expands(x):
        return F.linear(x, weight)
    return dense_gemm_expanded(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
