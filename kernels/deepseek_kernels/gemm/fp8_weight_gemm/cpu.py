"""Few rows in C++: FP8 values are decoded in registers, at the speed at which they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import FEW_ROWS, needs_gradient

__all__ = ["fp8_weight_gemm", "takes"]


def takes(rows: Tensor, weight: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    return (
        rows.dtype in (torch.bfloat16, torch.float32)
        and 0 < len(rows) <= FEW_ROWS
        and weight.is_contiguous()
        and weight.numel() > 0
        and not needs_gradient(rows)
    )


def fp8_weight_gemm(rows: Tensor, weight: Tensor, scale: Tensor, block_size: tuple[int, int]) -> Tensor:
    """See `fp8_weight_gemm`; rows [M, K]."""
    return torch.ops.deepseek_kernels_cpu.fp8_weight(rows, weight, scale, *block_size)
