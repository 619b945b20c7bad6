"""Root-mean-square normalization (arXiv 1910.07467), as the published checkpoints mean it, with FP8 behind it.

A norm whose result goes into FP8 layers alone quantizes it in the same pass, once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_kernels.norm.rms_norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize

from ..config.argument_types import Size, check_types
from .linear import Linear, QuantizedRows, declares, is_plain_module

__all__ = ["RMSNorm", "add_and_normalize", "normalize"]


@check_types
class RMSNorm(nn.Module):
    """`weight * (x / sqrt(mean(x²) + eps))`: statistics in float32, rounded to `x.dtype` before the weight."""

    def __init__(
        self,
        hidden_size: Size,
        eps: float = 1e-6,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
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


def normalize(norm: nn.Module, x: Tensor, reader: nn.Module) -> Tensor | QuantizedRows:
    """Returns `norm(x)` as `reader` takes it: in FP8 if it hands it to linear layers alone and they multiply FP8.

    The numbers are the same: those layers would quantize the norm's result, each for itself.

    Args:
        norm: any module; only a plain `RMSNorm` is fused.
        x: [..., H].
        reader: the only module that reads the result. Its class says with `norm_consumers` which linear layers do.
    """
    if not is_plain_module(norm, RMSNorm):
        return norm(x)
    consumers = _fp8_consumers(reader, x.device)
    if not consumers or not _may_quantize(norm, x):
        return rms_norm(x, norm.weight, norm.eps)  # type: ignore
    codes, scale = rms_norm_quantize(x, norm.weight, norm.eps, consumers[0].scale_format)  # type: ignore
    return QuantizedRows(codes, scale, x.shape, x.dtype)


def add_and_normalize(
    norm: nn.Module, x: Tensor, residual: Tensor, reader: nn.Module
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Returns the norm of `residual + x`, as `normalize` does, and the sum."""
    if not is_plain_module(norm, RMSNorm):  # called as any norm is, with what it always got
        total = residual + x
        return norm(total), total
    consumers = _fp8_consumers(reader, x.device)
    if not consumers or residual.dtype != x.dtype or not _may_quantize(norm, x):
        return add_rms_norm(x, residual, norm.weight, norm.eps)  # type: ignore
    codes, scale, total = add_rms_norm_quantize(x, residual, norm.weight, norm.eps, consumers[0].scale_format)  # type: ignore
    return QuantizedRows(codes, scale, x.shape, x.dtype), total


def _fp8_consumers(reader: nn.Module, device: torch.device) -> tuple[Linear, ...]:
    """Returns the linear layers that alone read what `reader` is given, if they take FP8 in one format; else none."""
    if type(reader) is Linear or "norm_consumers" not in type(reader).__dict__:
        return ()
    consumers: tuple[Linear, ...] = reader.norm_consumers()  # type: ignore
    for layer in consumers:
        if type(layer) is Linear:  # nearly always, and the end of it
            return ()
    if not is_plain_module(reader, type(reader)):
        return ()
    for layer in consumers:
        if not declares(layer, "takes_fp8") or not layer.takes_fp8(device):
            return ()
    return consumers if len({layer.scale_format for layer in consumers}) == 1 else ()


def _may_quantize(norm: nn.Module, x: Tensor) -> bool:
    """Returns True if nothing but FP8 is needed of the norm: no gradient, and no cast by autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return norm.weight.dtype == x.dtype
