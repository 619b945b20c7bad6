"""FP8 quantization in Triton. Memory-bound: what counts is bytes in flight and few instructions for each element."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .reference import ACTIVATION_FLOOR, FP8_MAX, GROUP, WEIGHT_FLOOR

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


def block_warps(elements: int, values: int) -> int:
    """Warps for a block of a weight, with so many values a thread."""
    return max(1, elements // (32 * values))


@triton.jit
def scale_of(amax, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, FLOOR), _MAX)
    if POWER_OF_TWO:
        # Up to the next power of two, on the bits: exact, unlike log2. Never subnormal; infinity stays.
        bits = scale.to(tl.uint32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def encode(x, scale, POWER_OF_TWO: tl.constexpr):
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
def rows_kernel(
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
    scale = scale_of(tl.max(tl.abs(values), 2), FLOOR, POWER_OF_TWO)  # [ROWS, GROUPS]
    out = tl.reshape(encode(values, scale[:, :, None], POWER_OF_TWO), (ROWS, COLUMNS))
    tl.store(codes + row[:, None] * codes_stride + column[None, :], out, inside)
    group = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group * GROUP < columns)[None, :]
    tl.store(scales + group[None, :] * scales_stride + row[:, None], scale, inside)


@triton.jit
def transposing_kernel(
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
    scale = scale_of(tl.max(tl.abs(values), 0), FLOOR, POWER_OF_TWO)  # [columns]
    out = tl.trans(encode(values, scale[None, :], POWER_OF_TWO))
    tl.store(codes_t + column[:, None] * codes_t_stride + row[None, :], out, tl.trans(inside))
    tl.store(scales_t + tl.program_id(0).to(tl.int64) * scales_t_stride + column, scale, column < columns)
    if BOTH:
        scale = scale_of(tl.max(tl.abs(values), 1), FLOOR, POWER_OF_TWO)  # [rows]
        out = encode(values, scale[:, None], POWER_OF_TWO)
        tl.store(codes + row[:, None] * codes_stride + column[None, :], out, inside)
        tl.store(scales + tl.program_id(1).to(tl.int64) * scales_stride + row, scale, row < rows)


@triton.jit
def grouped_kernel(
    x,
    ends,
    codes_t,
    scales_t,
    rows,
    columns,
    experts,
    x_stride,
    codes_t_stride,
    scales_t_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One group of up to ROWS tokens of one expert, or of nobody: every program finds its own among the ends, which
    never leave the device. EXPERTS is a power of two."""
    group = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, expert < experts, other=0)
    start = tl.load(ends + expert - 1, (expert > 0) & (expert < experts), other=0)
    groups = tl.cdiv(end - start, ROWS)
    after = tl.cumsum(groups, 0)
    before = after - groups
    own = (before <= group) & (group < after)  # of one expert at most: an empty one has after == before
    row = tl.sum(tl.where(own, start + (group - before) * ROWS, 0), 0) + tl.arange(0, ROWS)
    limit = tl.minimum(tl.sum(tl.where(own, end, 0), 0), rows)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < limit)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(values), 0), FLOOR, POWER_OF_TWO)  # [columns]
    # An infinity makes NaN of its whole group, but not of columns that hold no token.
    out = tl.where(inside, encode(values, scale[None, :], POWER_OF_TWO), 0.0)
    token = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(codes_t + column[:, None] * codes_t_stride + token[None, :], tl.trans(out), (column < columns)[:, None])
    tl.store(scales_t + group.to(tl.int64) * scales_t_stride + column, scale, column < columns)


@triton.jit
def _block(rows, columns, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where this program's block is in [E, parts * rows, columns]: its expert, its first row there, the row of the
    expert's grid of scales, the columns, and which of its rows and columns exist. Each part has a grid of its own."""
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    block = tl.program_id(0) // across
    matrix, within = block // down, block % down
    row = within * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    first = (matrix % parts).to(tl.int64) * rows + within * ROWS
    return (matrix // parts).to(tl.int64), first, (block % (parts * down)).to(tl.int64), column[None, :], inside


@triton.jit
def quantize_blocks_kernel(
    x,
    codes,
    scale,
    rows,
    columns,
    parts,
    x_expert_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Codes and scales are contiguous; `rows` are those of one part."""
    expert, first, _, column, inside = _block(rows, columns, parts, ROWS, COLUMNS)
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    x += expert * x_expert_stride + first * x_stride
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    block_scale = scale_of(tl.max(tl.max(tl.abs(values), 1), 0), FLOOR, POWER_OF_TWO)
    divisor = block_scale
    if not POWER_OF_TWO and block_scale < 1e-30:
        # The correction of a quotient would be subnormal, and lose bits: the same quotient, further up.
        values, divisor = values * _LIFT, divisor * _LIFT
    out = encode(values, divisor, POWER_OF_TWO)
    codes += (expert * parts * rows + first) * columns
    tl.store(codes + row * columns + column, out, inside)
    tl.store(scale + tl.program_id(0), block_scale)


@triton.jit
def dequantize_blocks_kernel(
    codes,
    scale,
    out,
    rows,
    columns,
    parts,
    codes_expert_stride,
    codes_stride,
    scale_expert_stride,
    scale_row_stride,
    scale_column_stride,
    out_expert_stride,
    out_stride,
    out_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, down, column, inside = _block(rows, columns, parts, ROWS, COLUMNS)
    along = tl.program_id(0).to(tl.int64) % tl.cdiv(columns, COLUMNS)
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    factor = tl.load(scale + expert * scale_expert_stride + down * scale_row_stride + along * scale_column_stride)
    codes += expert * codes_expert_stride + first * codes_stride
    # Through float16, which holds every e4m3 number and is what the hardware converts to.
    values = tl.load(codes + row * codes_stride + column, inside, other=0.0)
    values = values.to(tl.float16).to(tl.float32) * factor
    out += expert * out_expert_stride + first * out_stride
    at = out + row * out_stride + column.to(tl.int64) * out_column_stride
    tl.store(at, values.to(out.dtype.element_ty), inside)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    codes, scales = "*fp8e4nv", "*fp32"
    sizes = dict.fromkeys(["rows", "columns", "x_stride", "codes_stride", "scales_stride", "x_expert_stride"], "i32")
    transposed = {"codes_t": codes, "scales_t": scales, "codes_t_stride": "i32", "scales_t_stride": "i32"}
    grouped = {"ends": "*i64", "experts": "i32"}
    # label, kernel, arguments besides x, tile, constants besides the tile's
    quantizers = [
        ("many rows", rows_kernel, {}, MANY, {"GROUP": GROUP}),
        ("few rows", rows_kernel, {}, FEW, {"GROUP": GROUP}),
        ("transposed", transposing_kernel, transposed, TRANSPOSED, {"BOTH": False}),
        ("grouped", grouped_kernel, {**transposed, **grouped}, TRANSPOSED, {"EXPERTS": 256}),
        ("grouped, one expert", grouped_kernel, {**transposed, **grouped}, TRANSPOSED, {"EXPERTS": 1}),
        ("both", transposing_kernel, transposed, BOTH, {"BOTH": True}),
        (
            "blocks",
            quantize_blocks_kernel,
            {"scale": scales, "parts": "i32"},
            Tile(GROUP, GROUP, block_warps(GROUP * GROUP, 128)),
            {},
        ),
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
    strides = dict.fromkeys(["codes_expert_stride", "codes_stride", "out_expert_stride", "out_stride"], "i32")
    others = dict.fromkeys(["parts", "scale_expert_stride", "scale_row_stride", "scale_column_stride"], "i32")
    for dtype in ("bf16", "fp32"):
        cases.append(
            CompileCase(
                name=f"dequantize blocks, {dtype}",
                kernel=dequantize_blocks_kernel,
                arguments={"codes": codes, "scale": scales, "out": f"*{dtype}", **sizes, **strides, **others},
                constants={"ROWS": GROUP, "COLUMNS": GROUP, "out_column_stride": 1},
                num_warps=block_warps(GROUP * GROUP, 64),
                aligned=frozenset(sizes) | frozenset(strides),
                targets=everywhere if dtype == "bf16" else ("sm_90",),
            )
        )
    return cases
