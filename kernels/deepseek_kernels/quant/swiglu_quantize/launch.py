"""Launches `swiglu_quantize`: a custom operator, opaque to torch.compile, in the tiles of `fp8_quantize`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.fp8 import GROUP, empty_codes, empty_scales
from ...common.host import cdiv, rows_readable
from ..fp8_quantize.configs import tile_for
from .kernel import swiglu_kernel

__all__ = ["swiglu_quantize"]


@torch.library.custom_op("deepseek_kernels::swiglu_quantize", mutates_args=())
def swiglu_quantize(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _new(gate_up, power_of_two)
    if codes.numel():
        gate_up, tile = rows_readable(gate_up), tile_for(*codes.shape)
        strides = (gate_up.stride(0), codes.stride(0), scales.stride(1))
        with torch.cuda.device_of(gate_up):
            swiglu_kernel[tile.grid(*codes.shape)](
                *(gate_up, codes, scales, *codes.shape, strides), POWER_OF_TWO=power_of_two, **tile.options
            )
    return codes, scales


@swiglu_quantize.register_fake
def _new(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    return empty_codes(rows, columns, gate_up.device), empty_scales(rows, cdiv(columns, GROUP), gate_up.device)
