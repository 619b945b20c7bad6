"""The projections of few queries in C++, which read each head's matrix once, where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.cpu import FEW_ROWS, needs_gradient

__all__ = ["latents_to_values", "queries_to_latents", "takes", "takes_codes"]


def takes(x: Tensor, up: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    return x.dtype == up.dtype and _takes(x, up)


def takes_codes(x: Tensor, up: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands, `up` in FP8."""
    return up.dtype == torch.float8_e4m3fn and _takes(x, up)


def _takes(x: Tensor, up: Tensor) -> bool:
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and up.is_contiguous()
        and 0 < x.shape[0] * x.shape[1] <= FEW_ROWS
        and 0 not in up.shape
        and not needs_gradient(x, up)
        and not torch.is_autocast_enabled("cpu")
    )


def queries_to_latents(q: Tensor, up: Tensor, own: int, *grid) -> Tensor:
    """See `queries_to_latents`; with the scales, block rows and block columns of FP8 values."""
    return torch.ops.deepseek_kernels_cpu.queries_to_latents(q, up, own, *grid)


def latents_to_values(latents: Tensor, up: Tensor, own: int, *grid) -> Tensor:
    """See `latents_to_values`; with the scales, block rows and block columns of FP8 values."""
    return torch.ops.deepseek_kernels_cpu.latents_to_values(latents, up, own, *grid)
