"""Launches the kernels of `hadamard_quantize`: custom operators, opaque to torch.compile, and a derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.fp8 import GROUP, empty_codes, empty_scales
from ...common.host import cdiv, rows_readable
from . import kernel
from .configs import options_for, rows_for

__all__ = ["hadamard", "hadamard_quantize"]


@torch.library.custom_op("deepseek_kernels::hadamard", mutates_args=())
def hadamard(x: Tensor) -> Tensor:
    out, width = _new(x), x.shape[-1]
    if not x.numel():
        return out
    rows = rows_readable(x.reshape(-1, width))
    count = rows_for(rows.shape[0], width)
    with torch.cuda.device_of(x):
        kernel.hadamard_kernel[(cdiv(rows.shape[0], count),)](
            *(rows, out, rows.shape[0], rows.stride(0)), **options_for(count, width)
        )
    return out


@hadamard.register_fake
def _new(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# The matrix is symmetric: the derivative is the rotation of the gradient.
hadamard.register_autograd(lambda ctx, grad: hadamard(grad))


@torch.library.custom_op("deepseek_kernels::hadamard_quantize", mutates_args=())
def hadamard_quantize(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _new_codes(x, power_of_two)
    if not x.numel():
        return codes, scales
    x, (rows, width) = rows_readable(x), x.shape
    count = rows_for(rows, width)
    with torch.cuda.device_of(x):
        kernel.hadamard_quantize_kernel[(cdiv(rows, count),)](
            *(x, codes, scales, rows, (x.stride(0), codes.stride(0), scales.stride(1))),
            POWER_OF_TWO=power_of_two,
            **options_for(count, width),
        )
    return codes, scales


@hadamard_quantize.register_fake
def _new_codes(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return empty_codes(rows, width, x.device), empty_scales(rows, cdiv(width, GROUP), x.device)
