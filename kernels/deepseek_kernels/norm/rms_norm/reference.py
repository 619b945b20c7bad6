"""The norm in plain PyTorch, a few elementwise operations that autograd differentiates."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.fp8_quantize import quantize_rows_reference

__all__ = ["add_rms_norm", "add_rms_norm_quantize", "rms_norm", "rms_norm_quantize"]

_WIDE = (torch.float32, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype and x.dtype in _WIDE:  # torch's own rounds 16-bit values only after the weight
        return torch.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    normed = rms_norm(x, weight, eps)
    return quantize_rows_reference(normed.reshape(x.shape[:-1].numel(), x.shape[-1]), power_of_two)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    return *rms_norm_quantize(total, weight, eps, power_of_two), total
