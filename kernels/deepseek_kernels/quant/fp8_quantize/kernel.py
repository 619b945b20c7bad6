"""FP8 quantization in Triton. Memory-bound: bytes in flight and few instructions for each element decide the speed."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common import fp8

GROUP = tl.constexpr(fp8.GROUP)
ACTIVATION_FLOOR = tl.constexpr(fp8.ACTIVATION_FLOOR)
WEIGHT_FLOOR = tl.constexpr(fp8.WEIGHT_FLOOR)
_MAX = tl.constexpr(fp8.FP8_MAX)
_LIFT = tl.constexpr(2.0**64)


@triton.jit
def scale_of(amax, FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Scale of groups whose largest magnitudes are `amax`."""
    scale = tl.div_rn(tl.maximum(amax, FLOOR), _MAX)
    if POWER_OF_TWO:
        # The next power of two, from the bits: exact, unlike log2. Never subnormal; infinity stays.
        bits = scale.to(tl.uint32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def encode(x, scale, POWER_OF_TWO: tl.constexpr):
    """e4m3 values of `x / scale`, the quotient rounded as by IEEE 754.

    A division is a dozen instructions and a branch. This takes one reciprocal for the whole group and one correction of
    the product with it. For all 2^23 significands of a scale and every x within 4 ulps of a boundary between two e4m3
    values, that gave the exact quotient (checked one by one, in C); elsewhere an ulp of the quotient changes nothing.
    With a power of two the product itself is exact. The signs are such that -0 stays -0. Quotients exceed 448 by an ulp
    at most, which rounds to 448 (TRAPS E6).
    """
    reciprocal = tl.where(scale < float("inf"), tl.div_rn(1.0, scale), float("nan"))
    x, reciprocal = tl.broadcast(x, reciprocal)
    quotient = x * reciprocal
    if not POWER_OF_TWO:
        x, scale = tl.broadcast(x, scale)
        quotient = tl.fma(tl.fma(quotient, scale, x * -1.0), reciprocal * -1.0, quotient)
    return quotient.to(tl.float8e4nv)


@triton.jit
def rows_tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of this program's tile, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def store_rows(values, codes, scales, rows, columns, codes_stride, scales_stride, POWER_OF_TWO: tl.constexpr):
    """Quantizes this program's tile [ROWS, COLUMNS] of float32 values in groups along the rows, and stores it."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    GROUPS: tl.constexpr = COLUMNS // GROUP
    row, column, inside = rows_tile(rows, columns, ROWS, COLUMNS)
    values = tl.reshape(values, (ROWS, GROUPS, GROUP))
    scale = scale_of(tl.max(tl.abs(values), 2), ACTIVATION_FLOOR, POWER_OF_TWO)  # [ROWS, GROUPS]
    out = tl.reshape(encode(values, scale[:, :, None], POWER_OF_TWO), (ROWS, COLUMNS))
    tl.store(codes + row[:, None] * codes_stride + column[None, :], out, inside)
    group = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group * GROUP < columns)[None, :]
    tl.store(scales + group[None, :] * scales_stride + row[:, None], scale, inside)


@triton.jit
def rows_kernel(
    x, codes, scales, rows, columns, strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """`strides` are of rows of x and codes, and of groups of scales."""
    x_stride, codes_stride, scales_stride = strides
    row, column, inside = rows_tile(rows, columns, ROWS, COLUMNS)
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    store_rows(values, codes, scales, rows, columns, codes_stride, scales_stride, POWER_OF_TWO)


@triton.jit
def transposing_kernel(
    x,
    codes,
    scales,
    codes_t,
    scales_t,
    rows,
    columns,
    strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BOTH: tl.constexpr,
):
    """One group of ROWS tokens: a scale for each column and, with BOTH, where columns are a group too, for each row.

    `strides` are of rows of x and codes, of groups of scales, and of the two transposed results.
    """
    x_stride, codes_stride, scales_stride, codes_t_stride, scales_t_stride = strides
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(values), 0), ACTIVATION_FLOOR, POWER_OF_TWO)  # [columns]
    out = tl.trans(encode(values, scale[None, :], POWER_OF_TWO))
    tl.store(codes_t + column[:, None] * codes_t_stride + row[None, :], out, tl.trans(inside))
    tl.store(scales_t + tl.program_id(0).to(tl.int64) * scales_t_stride + column, scale, column < columns)
    if BOTH:
        scale = scale_of(tl.max(tl.abs(values), 1), ACTIVATION_FLOOR, POWER_OF_TWO)  # [rows]
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
    strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One group of up to ROWS tokens of one expert, or of none.

    Every program finds its rows in `ends`, which never leave the device. EXPERTS is a power of two.
    """
    x_stride, codes_t_stride, scales_t_stride = strides
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
    scale = scale_of(tl.max(tl.abs(values), 0), ACTIVATION_FLOOR, POWER_OF_TWO)  # [columns]
    # An infinity makes NaN of its whole group, but not of columns that hold no token.
    out = tl.where(inside, encode(values, scale[None, :], POWER_OF_TWO), 0.0)
    token = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(codes_t + column[:, None] * codes_t_stride + token[None, :], tl.trans(out), (column < columns)[:, None])
    tl.store(scales_t + group.to(tl.int64) * scales_t_stride + column, scale, column < columns)


@triton.jit
def _block(rows, columns, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's block of [E, parts * rows, columns], in which each part has a grid of scales of its own.

    Returns its expert, its first row there, its row of the expert's grid of scales, its columns, and the mask of rows
    and columns that exist.
    """
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
    strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One block. Codes and scales are contiguous; `rows` are those of one part; `strides` are of x, expert and row."""
    x_expert_stride, x_stride = strides
    expert, first, _, column, inside = _block(rows, columns, parts, ROWS, COLUMNS)
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    x += expert * x_expert_stride + first * x_stride
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    block_scale = scale_of(tl.max(tl.max(tl.abs(values), 1), 0), WEIGHT_FLOOR, POWER_OF_TWO)
    divisor = block_scale
    if not POWER_OF_TWO and block_scale < 1e-30:
        # The correction of a quotient would be subnormal and lose bits: both are multiplied, which leaves the quotient.
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
    codes_strides,
    scale_strides,
    out_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block; `rows` are those of one part; strides are of expert and row, those of scale and out of column too."""
    codes_expert_stride, codes_stride = codes_strides
    scale_expert_stride, scale_row_stride, scale_column_stride = scale_strides
    out_expert_stride, out_stride, out_column_stride = out_strides
    expert, first, down, column, inside = _block(rows, columns, parts, ROWS, COLUMNS)
    along = tl.program_id(0).to(tl.int64) % tl.cdiv(columns, COLUMNS)
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    factor = tl.load(scale + expert * scale_expert_stride + down * scale_row_stride + along * scale_column_stride)
    codes += expert * codes_expert_stride + first * codes_stride
    # Through float16, which holds every e4m3 number and to which the hardware converts.
    values = tl.load(codes + row * codes_stride + column, inside, other=0.0)
    values = values.to(tl.float16).to(tl.float32) * factor
    out += expert * out_expert_stride + first * out_stride
    at = out + row * out_stride + column.to(tl.int64) * out_column_stride
    tl.store(at, values.to(out.dtype.element_ty), inside)
