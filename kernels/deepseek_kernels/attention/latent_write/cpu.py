"""Norm, rotation and storing in C++: a token is read once, normed in the order of `rms_norm`'s C++ and stored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["takes", "write"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(kv: Tensor, weight: Tensor, buffer: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    stored = buffer.dtype == torch.uint8 or buffer.dtype in _DTYPES
    return stored and kv.dtype in _DTYPES and weight.dtype in _DTYPES and buffer.stride(2) == 1


def write(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    """As `reference.write`."""
    torch.ops.deepseek_kernels_cpu.latent_write(kv, weight, eps, cos, sin, buffer, slots, paged)
