"""Norms whose result goes into FP8 layers: quantized in the same pass, once for all the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepseek_kernels.norm.rms_norm import add_rms_norm_quantize, rms_norm_quantize

from ..layers.norm import RMSNorm
from ..layers.plain_module import is_plain_module
from .fp8_base import QuantizedRows
from .fp8_linear import FP8Linear

__all__ = ["add_norm_for", "norm_for"]


def norm_for(layers: Sequence[nn.Module], norm: nn.Module, x: Tensor) -> Tensor | QuantizedRows:
    """`norm(x)` as `layers`, which alone read it, take it: FP8 if all of them multiply FP8 activations.

    The numbers are the same: those layers would quantize what the norm gives them, each for itself.
    """
    if not _quantized(layers, norm, x):
        return norm(x)
    codes, scale = rms_norm_quantize(x, norm.weight, norm.eps, layers[0].scale_format)
    return QuantizedRows(codes, scale, x.shape, x.dtype)


def add_norm_for(
    layers: Sequence[nn.Module], norm: nn.Module, x: Tensor, residual: Tensor
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """The norm of `residual + x`, likewise, and the sum."""
    if not is_plain_module(norm, RMSNorm):  # called as any norm is, with what it always got
        total = residual + x
        return norm(total), total
    if not _quantized(layers, norm, x) or residual.dtype != x.dtype:
        return norm(x, residual)
    codes, scale, total = add_rms_norm_quantize(x, residual, norm.weight, norm.eps, layers[0].scale_format)
    return QuantizedRows(codes, scale, x.shape, x.dtype), total


def _quantized(layers: Sequence[nn.Module], norm: nn.Module, x: Tensor) -> bool:
    if not layers or torch.is_grad_enabled() or not is_plain_module(norm, RMSNorm) or norm.weight.dtype != x.dtype:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return (
        all(is_plain_module(one, FP8Linear) and one.reads_fp8(x.device) for one in layers)
        and len({one.scale_format for one in layers}) == 1
    )
