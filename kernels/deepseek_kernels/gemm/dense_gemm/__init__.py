"""`dense_gemm`: the product of activations with a linear layer's weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ... import dispatch
from ...common.half_products import MIN_ROWS, expands
from .reference import dense_gemm_expanded

__all__ = ["dense_gemm"]

dispatch.register("dense_gemm")


def dense_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """Computes `x @ weight.T`, with float32 accumulation, rounded once to `x.dtype`.

    Args:
        x: [..., K].
        weight: [N, K], of the same dtype.

    Returns:
        [..., N].

    On a CPU that has no 16-bit products, 16 or more rows of bfloat16 or float16 run on blocks of the weight expanded
    to float32; fewer rows are bound by reading the weight, which PyTorch's own product does at full speed.
    """
    dispatch.pick("dense_gemm")
    x, weight = dispatch.autocast(x, weight)
    if weight.dtype != x.dtype or x.numel() < MIN_ROWS * x.shape[-1] or not expands(x):
        return F.linear(x, weight)
    return dense_gemm_expanded(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
