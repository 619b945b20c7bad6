"""Root-mean-square normalization (arXiv 1910.07467), as the published checkpoints mean it, with FP8 behind it.

A norm whose result goes into FP8 layers alone quantizes it in the same pass, once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from deepseek_kernels.norm.rms_norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize

from .linear import Linear, QuantizedRows, declares, is_plain_module

__all__ = ["RMSNorm", "add_and_normalize", "normalize"]


class RMSNorm(nn.Module):
    """`weight * (x / sqrt(mean(x²) + eps))`: statistics in float32, rounded to `x.dtype` before the weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalizes [..., hidden_size]; with a residual like x, their sum, which is returned as well."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def normalize(norm: nn.Module, x: Tensor, consumers: Sequence[nn.Module]) -> Tensor | QuantizedRows:
    """Returns `norm(x)` as `consumers` take it: in FP8 if all of them multiply FP8 activations.

    The numbers are the same: those layers would quantize the norm's result, each for itself.

    Args:
        norm: any module; only a plain `RMSNorm` is fused.
        x: [..., H].
        consumers: the linear layers that alone read the result; empty where others do too, or may.
    """
    if not consumers or not _quantizes(norm, x, consumers):
        return norm(x)
    plain = cast(RMSNorm, norm)
    codes, scale = rms_norm_quantize(x, plain.weight, plain.eps, _scale_format(consumers))
    return QuantizedRows(codes, scale, x.shape, x.dtype)


def add_and_normalize(
    norm: nn.Module, x: Tensor, residual: Tensor, consumers: Sequence[nn.Module]
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Returns the norm of `residual + x`, as `normalize` does, and the sum."""
    if not is_plain_module(norm, RMSNorm):  # called as any norm is, with what it always got
        total = residual + x
        return norm(total), total
    if not consumers or residual.dtype != x.dtype or not _quantizes(norm, x, consumers):
        return norm(x, residual)
    plain = cast(RMSNorm, norm)
    codes, scale, total = add_rms_norm_quantize(x, residual, plain.weight, plain.eps, _scale_format(consumers))
    return QuantizedRows(codes, scale, x.shape, x.dtype), total


def _quantizes(norm: nn.Module, x: Tensor, consumers: Sequence[nn.Module]) -> bool:
    """Returns True if all consumers take FP8 in one format, and nobody needs the norm's own result or its gradient."""
    for layer in consumers:
        if not declares(layer, "takes_fp8") or not cast(Linear, layer).takes_fp8(x.device):
            return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    one_format = len({cast(Linear, layer).scale_format for layer in consumers}) == 1
    return one_format and is_plain_module(norm, RMSNorm) and norm.weight.dtype == x.dtype


def _scale_format(consumers: Sequence[nn.Module]) -> str | None:
    return cast(Linear, consumers[0]).scale_format
