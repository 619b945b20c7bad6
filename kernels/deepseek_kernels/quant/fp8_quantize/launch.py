"""Launches the kernels of `fp8_quantize`: custom operators, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common import host
from ...common.fp8 import GROUP, block_grid, empty_codes, empty_scales
from ...common.host import cdiv, rows_readable
from . import kernel
from .configs import BOTH, TRANSPOSED, Tile, block_tile, tile_for
from .reference import grouped_capacity

__all__ = [
    "dequantize_into",
    "quantize_blocks",
    "quantize_both",
    "quantize_grouped_transposed",
    "quantize_rows",
    "quantize_transposed",
]


def _experts(stacked: Tensor) -> Tensor:
    """Views [R, C] as [1, R, C]."""
    return stacked if stacked.ndim == 3 else stacked[None]


@torch.library.custom_op("deepseek_kernels::fp8_quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _new_rows(x, power_of_two)
    if not x.numel():
        return codes, scales
    x, (rows, columns) = rows_readable(x), x.shape
    tile = tile_for(rows, columns)
    with torch.cuda.device_of(x):
        kernel.rows_kernel[tile.grid(rows, columns)](
            *(x, codes, scales, rows, columns, (x.stride(0), codes.stride(0), scales.stride(1))),
            POWER_OF_TWO=power_of_two,
            **tile.options,
        )
    return codes, scales


@quantize_rows.register_fake
def _new_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_codes(rows, columns, x.device), empty_scales(rows, cdiv(columns, GROUP), x.device)


@torch.library.custom_op("deepseek_kernels::fp8_quantize_transposed", mutates_args=())
def quantize_transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes_t, scales_t = _new_transposed(x, power_of_two)
    _transpose(x, codes_t, scales_t, codes_t, scales_t, power_of_two, TRANSPOSED)
    return codes_t, scales_t


@quantize_transposed.register_fake
def _new_transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _new_rows(x.T, power_of_two)


@torch.library.custom_op("deepseek_kernels::fp8_quantize_both", mutates_args=())
def quantize_both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scales, codes_t, scales_t = _new_both(x, power_of_two)
    _transpose(x, codes, scales, codes_t, scales_t, power_of_two, BOTH)
    return codes, scales, codes_t, scales_t


@quantize_both.register_fake
def _new_both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_new_rows(x, power_of_two), *_new_rows(x.T, power_of_two)


def _transpose(
    x: Tensor, codes: Tensor, scales: Tensor, codes_t: Tensor, scales_t: Tensor, power_of_two: bool, tile: Tile
) -> None:
    if not x.numel():
        return
    x, (rows, columns) = rows_readable(x), x.shape
    strides = (x.stride(0), codes.stride(0), scales.stride(1), codes_t.stride(0), scales_t.stride(1))
    with torch.cuda.device_of(x):
        kernel.transposing_kernel[tile.grid(rows, columns)](
            *(x, codes, scales, codes_t, scales_t, rows, columns, strides),
            POWER_OF_TWO=power_of_two,
            BOTH=tile is BOTH,
            **tile.options,
        )


@torch.library.custom_op("deepseek_kernels::fp8_quantize_grouped_transposed", mutates_args=())
def quantize_grouped_transposed(x: Tensor, ends: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes_t, scales_t = _new_grouped(x, ends, power_of_two)
    if not codes_t.numel():
        return codes_t, scales_t
    x, ends, (rows, columns) = rows_readable(x), ends.contiguous(), x.shape
    strides = (x.stride(0), codes_t.stride(0), scales_t.stride(1))
    with torch.cuda.device_of(x):
        kernel.grouped_kernel[TRANSPOSED.grid(codes_t.shape[1], columns)](
            *(x, ends, codes_t, scales_t, rows, columns, ends.shape[0], strides),
            EXPERTS=host.power_of_two(max(1, ends.shape[0])),
            POWER_OF_TWO=power_of_two,
            **TRANSPOSED.options,
        )
    return codes_t, scales_t


@quantize_grouped_transposed.register_fake
def _new_grouped(x: Tensor, ends: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    columns = grouped_capacity(x.shape[0], ends.shape[0])
    return empty_codes(x.shape[1], columns, x.device), empty_scales(x.shape[1], columns // GROUP, x.device)


@torch.library.custom_op("deepseek_kernels::fp8_quantize_blocks", mutates_args=())
def quantize_blocks(
    weight: Tensor, block_rows: int, block_columns: int, power_of_two: bool, parts: int
) -> tuple[Tensor, Tensor]:
    codes, scale = _new_blocks(weight, block_rows, block_columns, power_of_two, parts)
    if not weight.numel():
        return codes, scale
    weight = _experts(rows_readable(weight))
    _, rows, columns = weight.shape
    with torch.cuda.device_of(weight):
        kernel.quantize_blocks_kernel[(scale.numel(),)](
            *(weight, codes, scale, rows // parts, columns, parts, weight.stride()[:2]),
            POWER_OF_TWO=power_of_two,
            **block_tile(block_rows, block_columns, values=128).options,
        )
    return codes, scale


@quantize_blocks.register_fake
def _new_blocks(
    weight: Tensor, block_rows: int, block_columns: int, power_of_two: bool, parts: int
) -> tuple[Tensor, Tensor]:
    grid = block_grid(weight.shape, (block_rows, block_columns), parts)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    return codes, torch.empty(grid, dtype=torch.float32, device=weight.device)


@torch.library.custom_op("deepseek_kernels::fp8_dequantize_into", mutates_args={"out"})
def dequantize_into(out: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, parts: int) -> None:
    if not codes.numel():
        return
    codes, wide, grid = _experts(rows_readable(codes)), _experts(out), _experts(scale)
    _, rows, columns = codes.shape
    strides = (codes.stride()[:2], grid.stride(), wide.stride())
    with torch.cuda.device_of(codes):
        kernel.dequantize_blocks_kernel[(scale.numel(),)](
            *(codes, scale, out, rows // parts, columns, parts, *strides),
            **block_tile(block_rows, block_columns, values=64).options,
        )


@dequantize_into.register_fake
def _dequantize_nothing(
    out: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, parts: int
) -> None:
    return None
