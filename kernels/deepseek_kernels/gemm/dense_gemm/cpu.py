"""Up to some dozens of rows in C++: few of them at the speed at which the weight is read."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import FEW_ROWS, multiplies_many, needs_gradient

__all__ = ["dense_gemm", "takes"]

# With more rows the built-in products, which pack the weight, are as fast.
_MOST_ROWS = {torch.float32: 64, torch.bfloat16: 32}
_MOST_COLUMNS = 4096  # of more than a few rows: activations have to stay in cache


def takes(x: Tensor, weight: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the built-in product's."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float32)
        and weight.ndim == 2
        and weight.is_contiguous()
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and (x.numel() <= FEW_ROWS * x.shape[-1] or _takes_many(x, weight))
        and not needs_gradient(x, weight)
    )


def _takes_many(x: Tensor, weight: Tensor) -> bool:
    rows, columns = _MOST_ROWS[x.dtype], x.shape[-1]
    return x.numel() <= rows * columns and columns <= _MOST_COLUMNS and multiplies_many(x.dtype, weight.dtype)


def dense_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """See `dense_gemm`."""
    rows = torch.ops.deepseek_kernels_cpu.dense(x.reshape(-1, weight.shape[1]), weight)
    return rows.view(*x.shape[:-1], weight.shape[0])
