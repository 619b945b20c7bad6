"""Norms whose result goes into FP8 layers: quantized in the same pass, once for all the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepseek_kernels.rms_norm import add_rms_norm_quantize, rms_norm_quantize

from .fp8_layer import QuantizedRows
from .fp8_linear import FP8Linear
from .norm import RMSNorm

__all__ = ["add_norm_for", "hooked", "norm_for"]


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
    """`norm(x, residual)`, the first result likewise."""
    if not _quantized(layers, norm, x) or residual.dtype != x.dtype:
        return norm(x, residual)
    codes, scale, total = add_rms_norm_quantize(x, residual, norm.weight, norm.eps, layers[0].scale_format)
    return QuantizedRows(codes, scale, x.shape, x.dtype), total


def _quantized(layers: Sequence[nn.Module], norm: nn.Module, x: Tensor) -> bool:
    if torch.is_grad_enabled() or type(norm) is not RMSNorm or norm.weight.dtype != x.dtype or hooked(norm):
        return False
    return (
        bool(layers)
        and not torch.is_autocast_enabled(x.device.type)
        and all(isinstance(one, FP8Linear) and one.reads_fp8(x.device) and not hooked(one) for one in layers)
        and len({one.scale_format for one in layers}) == 1
    )


def hooked(module: nn.Module) -> bool:
    """Whether somebody else hears of a module's calls, or is called instead of it."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or hasattr(module, "_hf_hook")
