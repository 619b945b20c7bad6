"""FP8 quantization in Triton. Memory-bound: what counts is bytes in flight and few instructions for each element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import ACTIVATION_FLOOR, FP8_MAX, GROUP, WEIGHT_FLOOR, block_grid, empty_codes, empty_scales

_MAX = tl.constexpr(FP8_MAX)
_LIFT = tl.constexpr(2.0**64)


@dataclass(frozen=True)
class Tile:
    """What one program takes, and its warps."""

    rows: int
    columns: int
    num_warps: int


# Chosen from the compile gate's registers (how many programs share a multiprocessor) and instructions for each value.
MANY = Tile(rows=8, columns=1024, num_warps=8)  # at most 64 registers: 4 programs; 16-byte loads, 4 of them in flight
FEW = Tile(rows=1, columns=GROUP, num_warps=1)  # a decode step: as many programs as there are groups
TRANSPOSED = Tile(rows=GROUP, columns=64, num_warps=4)  # at most 128 registers: 4 programs
BOTH = Tile(rows=GROUP, columns=GROUP, num_warps=4)  # 8 warps need fewer registers but fit once only, instead of twice
_ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


@triton.jit
def _scale_of(amax, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, FLOOR), _MAX)
    if POWER_OF_TWO:
        # Up to the next power of two, on the bits: exact, unlike log2. Never subnormal; infinity stays.
        bits = scale.to(tl.uint32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _encode(x, scale, POWER_OF_TWO: tl.constexpr):
    """e4m3 codes of `x / scale`, the quotient rounded as IEEE 754 asks for.

    A division is a dozen instructions and a branch. This takes one reciprocal for the whole group and one correction of
    the product with it. For all 2^23 significands of a scale and every x within 4 ulps of where a code changes, that
    gave the very quotient (checked one by one, in C); elsewhere an ulp of the quotient decides nothing. With a power of
    two the product itself is exact. The signs are such that -0 stays -0. Quotients exceed 448 by an ulp at most, which
    rounds to 448 (TRAPS E6).
    """
    reciprocal = tl.where(scale < float("inf"), tl.div_rn(1.0, scale), float("nan"))
    x, reciprocal = tl.broadcast(x, reciprocal)
    quotient = x * reciprocal
    if not POWER_OF_TWO:
        x, scale = tl.broadcast(x, scale)
        quotient = tl.fma(tl.fma(quotient, scale, x * -1.0), reciprocal * -1.0, quotient)
    return quotient.to(tl.float8e4nv)


@triton.jit
def _rows_kernel(
    x,
    codes,
    scales,
    rows,
    columns,
    x_stride,
    codes_stride,
    scales_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    GROUPS: tl.constexpr = COLUMNS // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    values = tl.reshape(values, (ROWS, GROUPS, GROUP))
    scale = _scale_of(tl.max(tl.abs(values), 2), FLOOR, POWER_OF_TWO)  # [ROWS, GROUPS]
    out = tl.reshape(_encode(values, scale[:, :, None], POWER_OF_TWO), (ROWS, COLUMNS))
    tl.store(codes + row[:, None] * codes_stride + column[None, :], out, inside)
    group = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group * GROUP < columns)[None, :]
    tl.store(scales + group[None, :] * scales_stride + row[:, None], scale, inside)


@triton.jit
def _transposing_kernel(
    x,
    codes,
    scales,
    codes_t,
    scales_t,
    rows,
    columns,
    x_stride,
    codes_stride,
    scales_stride,
    codes_t_stride,
    scales_t_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BOTH: tl.constexpr,
):
    """One group of ROWS tokens: a scale for each column and, with BOTH, where columns are a group too, for each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(values), 0), FLOOR, POWER_OF_TWO)  # [columns]
    out = tl.trans(_encode(values, scale[None, :], POWER_OF_TWO))
    tl.store(codes_t + column[:, None] * codes_t_stride + row[None, :], out, tl.trans(inside))
    tl.store(scales_t + tl.program_id(0).to(tl.int64) * scales_t_stride + column, scale, column < columns)
    if BOTH:
        scale = _scale_of(tl.max(tl.abs(values), 1), FLOOR, POWER_OF_TWO)  # [rows]
        out = _encode(values, scale[:, None], POWER_OF_TWO)
        tl.store(codes + row[:, None] * codes_stride + column[None, :], out, inside)
        tl.store(scales + tl.program_id(1).to(tl.int64) * scales_stride + row, scale, row < rows)


@triton.jit
def _quantize_blocks_kernel(
    x,
    codes,
    scale,
    rows,
    columns,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    block_scale = _scale_of(tl.max(tl.max(tl.abs(values), 1), 0), FLOOR, POWER_OF_TWO)
    divisor = block_scale
    if not POWER_OF_TWO and block_scale < 1e-30:
        # The correction of a quotient would be subnormal, and lose bits: the same quotient, further up.
        values, divisor = values * _LIFT, divisor * _LIFT
    out = _encode(values, divisor, POWER_OF_TWO)
    tl.store(codes + row[:, None] * columns + column[None, :], out, inside)
    tl.store(scale + tl.program_id(0), block_scale)


@triton.jit
def _dequantize_blocks_kernel(
    codes,
    scale,
    out,
    rows,
    columns,
    codes_stride,
    scale_row_stride,
    scale_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    down, along = (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64)
    row, column = down * ROWS + tl.arange(0, ROWS), along * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    factor = tl.load(scale + down * scale_row_stride + along * scale_column_stride)
    # Through float16, which holds every e4m3 number and is what the hardware converts to.
    values = tl.load(codes + row[:, None] * codes_stride + column[None, :], inside, other=0.0)
    values = values.to(tl.float16).to(tl.float32) * factor
    tl.store(out + row[:, None] * columns + column[None, :], values.to(out.dtype.element_ty), inside)


def _tile(rows: int, columns: int) -> Tile:
    programs = triton.cdiv(rows, MANY.rows) * triton.cdiv(columns, MANY.columns)
    return MANY if programs >= _ENOUGH_PROGRAMS else FEW


def _rows_readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


# Custom operators: opaque to torch.compile, which knows shapes and strides from the fakes.
@torch.library.custom_op("deepseek_kernels::fp8_quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _new_rows(x, power_of_two)
    if not x.numel():
        return codes, scales
    x, (rows, columns) = _rows_readable(x), x.shape
    tile = _tile(rows, columns)
    with torch.cuda.device_of(x):
        _rows_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)](
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
    x, (rows, columns) = _rows_readable(x), x.shape
    strides = (x.stride(0), codes.stride(0), scales.stride(1), codes_t.stride(0), scales_t.stride(1))
    with torch.cuda.device_of(x):
        _transposing_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)](
            *(x, codes, scales, codes_t, scales_t, rows, columns, *strides),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            FLOOR=ACTIVATION_FLOOR,
            POWER_OF_TWO=power_of_two,
            BOTH=tile is BOTH,
            num_warps=tile.num_warps,
        )


@torch.library.custom_op("deepseek_kernels::fp8_quantize_blocks", mutates_args=())
def quantize_blocks(weight: Tensor, block_rows: int, block_columns: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scale = _new_blocks(weight, block_rows, block_columns, power_of_two)
    if not weight.numel():
        return codes, scale
    weight = _rows_readable(weight)
    with torch.cuda.device_of(weight):
        _quantize_blocks_kernel[(scale.numel(),)](
            *(weight, codes, scale, *weight.shape, weight.stride(0)),
            ROWS=block_rows,
            COLUMNS=block_columns,
            FLOOR=WEIGHT_FLOOR,
            POWER_OF_TWO=power_of_two,
            num_warps=_warps(block_rows * block_columns, values=128),
        )
    return codes, scale


@quantize_blocks.register_fake
def _new_blocks(weight: Tensor, block_rows: int, block_columns: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    grid = block_grid(weight.shape, (block_rows, block_columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    return codes, torch.empty(grid, dtype=torch.float32, device=weight.device)


@torch.library.custom_op("deepseek_kernels::fp8_dequantize_blocks", mutates_args=())
def dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    out = _new_dequantized(codes, scale, block_rows, block_columns, dtype)
    if not out.numel():
        return out
    codes = _rows_readable(codes)
    with torch.cuda.device_of(codes):
        _dequantize_blocks_kernel[(scale.numel(),)](
            *(codes, scale, out, *codes.shape, codes.stride(0), *scale.stride()),
            ROWS=block_rows,
            COLUMNS=block_columns,
            num_warps=_warps(block_rows * block_columns, values=64),
        )
    return out


@dequantize_blocks.register_fake
def _new_dequantized(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _warps(elements: int, values: int) -> int:
    """Warps for a block, with so many values a thread."""
    return max(1, elements // (32 * values))


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ..testing.compile_gate import CompileCase

    codes, scales = "*fp8e4nv", "*fp32"
    sizes = dict.fromkeys(["rows", "columns", "x_stride", "codes_stride", "scales_stride"], "i32")
    transposed = {"codes_t": codes, "scales_t": scales, "codes_t_stride": "i32", "scales_t_stride": "i32"}
    # label, kernel, arguments besides x, tile, constants besides the tile's
    quantizers = [
        ("many rows", _rows_kernel, {}, MANY, {"GROUP": GROUP}),
        ("few rows", _rows_kernel, {}, FEW, {"GROUP": GROUP}),
        ("transposed", _transposing_kernel, transposed, TRANSPOSED, {"BOTH": False}),
        ("both", _transposing_kernel, transposed, BOTH, {"BOTH": True}),
        ("blocks", _quantize_blocks_kernel, {"scale": scales}, Tile(GROUP, GROUP, _warps(GROUP * GROUP, 128)), {}),
    ]
    everywhere = ("sm_90", "sm_100", "gfx942")
    cases = []
    for label, kernel, more, tile, constants in quantizers:
        floor = WEIGHT_FLOOR if label == "blocks" else ACTIVATION_FLOOR
        for dtype, power_of_two in (("bf16", False), ("bf16", True), ("fp32", False)):
            cases.append(
                CompileCase(
                    name=f"{label}, {dtype}" + (", ue8m0" if power_of_two else ""),
                    kernel=kernel,
                    arguments={"x": f"*{dtype}", "codes": codes, "scales": scales, **sizes, **more},
                    constants={
                        **constants,
                        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "FLOOR": floor, "POWER_OF_TWO": power_of_two},
                    },
                    num_warps=tile.num_warps,
                    aligned=frozenset(sizes) | frozenset(transposed),
                    targets=everywhere if dtype == "bf16" and not power_of_two else ("sm_90",),
                )
            )
    strides = {"codes_stride": "i32", "scale_row_stride": "i32", "scale_column_stride": "i32"}
    for dtype in ("bf16", "fp32"):
        cases.append(
            CompileCase(
                name=f"dequantize blocks, {dtype}",
                kernel=_dequantize_blocks_kernel,
                arguments={"codes": codes, "scale": scales, "out": f"*{dtype}", **sizes, **strides},
                constants={"ROWS": GROUP, "COLUMNS": GROUP},
                num_warps=_warps(GROUP * GROUP, 64),
                aligned=frozenset(sizes),
                targets=everywhere if dtype == "bf16" else ("sm_90",),
            )
        )
    return cases
