"""Few rows in C++, at the speed at which the weight is read."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import FEW_ROWS, needs_gradient

__all__ = ["dense_gemm", "takes"]


def takes(x: Tensor, weight: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the built-in product's."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float32)
        and weight.ndim == 2
        and weight.is_contiguous()
        and x.shape[-1] == weight.shape[1]
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and not needs_gradient(x, weight)
    )


def dense_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """See `dense_gemm`."""
    rows = torch.ops.deepseek_kernels_cpu.dense(x.reshape(-1, weight.shape[1]), weight)
    return rows.view(*x.shape[:-1], weight.shape[0])
