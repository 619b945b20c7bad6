"""What starts the kernels: custom operators, opaque to torch.compile, which knows shapes and strides from the fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernel
from .kernel import BOTH, FEW, MANY, TRANSPOSED, Tile, block_warps
from .reference import ACTIVATION_FLOOR, GROUP, WEIGHT_FLOOR, block_grid, empty_codes, empty_scales, grouped_capacity

ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_for(rows: int, columns: int) -> Tile:
    programs = cdiv(rows, MANY.rows) * cdiv(columns, MANY.columns)
    return MANY if programs >= ENOUGH_PROGRAMS else FEW


def rows_readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _experts(stacked: Tensor) -> Tensor:
    """[R, C] as [1, R, C]."""
    return stacked if stacked.ndim == 3 else stacked[None]


@torch.library.custom_op("deepseek_kernels::fp8_quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _new_rows(x, power_of_two)
    if not x.numel():
        return codes, scales
    x, (rows, columns) = rows_readable(x), x.shape
    tile = tile_for(rows, columns)
    with torch.cuda.device_of(x):
        kernel.rows_kernel[cdiv(rows, tile.rows), cdiv(columns, tile.columns)](
            *(x, codes, scales, rows, columns, x.stride(0), codes.stride(0), scales.stride(1)),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            GROUP=GROUP,
            FLOOR=ACTIVATION_FLOOR,
            POWER_OF_TWO=power_of_two,
            num_warps=tile.num_warps,
        )
    return codes, scales


@quantize_rows.register_fake
def _new_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_codes(rows, columns, x.device), empty_scales(rows, -(-columns // GROUP), x.device)


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
    out = _new_both(x, power_of_two)
    _transpose(x, *out, power_of_two, BOTH)
    return out


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
        kernel.transposing_kernel[cdiv(rows, tile.rows), cdiv(columns, tile.columns)](
            *(x, codes, scales, codes_t, scales_t, rows, columns, *strides),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            FLOOR=ACTIVATION_FLOOR,
            POWER_OF_TWO=power_of_two,
            BOTH=tile is BOTH,
            num_warps=tile.num_warps,
        )


@torch.library.custom_op("deepseek_kernels::fp8_quantize_grouped_transposed", mutates_args=())
def quantize_grouped_transposed(x: Tensor, ends: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes_t, scales_t = _new_grouped(x, ends, power_of_two)
    if not codes_t.numel():
        return codes_t, scales_t
    x, ends, (rows, columns) = rows_readable(x), ends.contiguous(), x.shape
    strides = (x.stride(0), codes_t.stride(0), scales_t.stride(1))
    with torch.cuda.device_of(x):
        kernel.grouped_kernel[cdiv(codes_t.shape[1], GROUP), cdiv(columns, TRANSPOSED.columns)](
            *(x, ends, codes_t, scales_t, rows, columns, ends.shape[0], *strides),
            ROWS=TRANSPOSED.rows,
            COLUMNS=TRANSPOSED.columns,
            EXPERTS=1 << max(0, ends.shape[0] - 1).bit_length(),
            FLOOR=ACTIVATION_FLOOR,
            POWER_OF_TWO=power_of_two,
            num_warps=TRANSPOSED.num_warps,
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
            *(weight, codes, scale, rows // parts, columns, parts, *weight.stride()[:2]),
            ROWS=block_rows,
            COLUMNS=block_columns,
            FLOOR=WEIGHT_FLOOR,
            POWER_OF_TWO=power_of_two,
            num_warps=block_warps(block_rows * block_columns, values=128),
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
    strides = (*codes.stride()[:2], *grid.stride(), *wide.stride())
    with torch.cuda.device_of(codes):
        kernel.dequantize_blocks_kernel[(scale.numel(),)](
            *(codes, scale, out, rows // parts, columns, parts, *strides),
            ROWS=block_rows,
            COLUMNS=block_columns,
            num_warps=block_warps(block_rows * block_columns, values=64),
        )


@dequantize_into.register_fake
def _dequantize_nothing(
    out: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, parts: int
) -> None:
    return None
