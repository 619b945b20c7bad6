"""The rotation in plain PyTorch, log2(D) passes of sums and differences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8_quantize import quantize_rows_reference

__all__ = ["hadamard", "hadamard_quantize"]


def hadamard(x: Tensor) -> Tensor:
    """See the operator."""
    width = x.shape[-1]
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, width)
    step = 1
    while step < width:
        pairs = rows.view(-1, width // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack((first + second, first - second), dim=2).view(-1, width)
        step *= 2
    return (rows * width**-0.5).view(x.shape).to(x.dtype)


def hadamard_quantize(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See the operator."""
    return quantize_rows_reference(hadamard(x), power_of_two)
