"""FP8 products in Triton. All of them are `total += dot(128 codes, 128 codes) * scales`.

A tensor core adds FP8 products with some 14 bits; what is longer than 128 terms is therefore summed in float32, with
the scales, by the ordinary arithmetic units (V3 report, section 3.3; TRAPS E8). `tl.dot` is never given the total: that
would move the long sum back into the tensor core.

Left and right operands are both stored with the summed dimension last, which FP8 `wgmma` asks for. Their rows start at
multiples of 16 bytes, and the summed dimension is a multiple of 16 (`launch.aligned`). Scales come for each row, or,
with LEFT_BLOCK or RIGHT_BLOCK, one for the whole tile of that operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...moe.grouped_gemm.kernel import raster


@triton.jit
def _scaled(part, left, right, LEFT_BLOCK: tl.constexpr, RIGHT_BLOCK: tl.constexpr):
    """A product of codes times their scales; one multiplication for each element where either is a single number."""
    if RIGHT_BLOCK:
        return part * (left * right)[:, None]
    elif LEFT_BLOCK:
        return part * (right * left)[None, :]
    else:
        return part * left[:, None] * right[None, :]


@triton.jit
def _scale_pointers(scale, row, row_stride, BLOCK: tl.constexpr):
    """Of these rows of a tile, or of the block that the tile is in."""
    if BLOCK:
        return scale
    else:
        return scale + row.to(tl.int64) * row_stride


@triton.jit
def _load_scales(pointers, row, valid, more, BLOCK: tl.constexpr):
    """Zeros for rows from `valid` on, and all over where `more` is false."""
    if BLOCK:
        return tl.load(pointers, more, other=0.0)
    else:
        return tl.load(pointers, row < tl.where(more, valid, 0), other=0.0)


@triton.jit
def plain_product(
    left,
    left_scale,
    left_valid,
    left_stride,
    left_scale_row,
    left_scale_group,
    right,
    right_scale,
    right_valid,
    right_stride,
    right_scale_row,
    right_scale_group,
    first,
    last,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT_BLOCK: tl.constexpr,
    RIGHT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile, groups `first` to `last` of it, by pointers to the tile's first rows.

    Rows beyond the valid ones, of which there is one at least, are read as the last valid one: no mask in the loop, and
    a result that is not stored.
    """
    k = tl.arange(0, GROUP)
    left_row = tl.minimum(tl.arange(0, ROWS), left_valid - 1)
    right_row = tl.minimum(tl.arange(0, COLUMNS), right_valid - 1)
    first_group = tl.cast(first, tl.int64)
    left_codes = left + left_row[:, None].to(tl.int64) * left_stride + (first_group * GROUP + k)[None, :]
    right_codes = right + right_row[:, None].to(tl.int64) * right_stride + (first_group * GROUP + k)[None, :]
    left_scales = _scale_pointers(left_scale, left_row, left_scale_row, LEFT_BLOCK)
    right_scales = _scale_pointers(right_scale, right_row, right_scale_row, RIGHT_BLOCK)
    left_scales += first_group * left_scale_group
    right_scales += first_group * right_scale_group
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Written here, and not at the launch only, the number of stages holds for the scales too.
    for group in tl.range(first, last, num_stages=STAGES):
        inside = (k < depth - group * GROUP)[None, :]
        part = tl.dot(tl.load(left_codes, inside, other=0.0), tl.load(right_codes, inside, other=0.0).T)
        total += _scaled(part, tl.load(left_scales), tl.load(right_scales), LEFT_BLOCK, RIGHT_BLOCK)
        left_codes += GROUP
        right_codes += GROUP
        left_scales += left_scale_group
        right_scales += right_scale_group
    return total


@triton.jit
def specialized_product(
    lefts,
    left_row,
    left_scale,
    left_valid,
    left_scale_row,
    left_scale_group,
    rights,
    right_row,
    right_scale,
    right_valid,
    right_scale_row,
    right_scale_group,
    first,
    groups,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    RIGHT_BLOCK: tl.constexpr,
):
    """One tile, `groups` groups of it from `first` on, by descriptors of both operands, which read zeros beyond them.

    Scale pointers are to the tile's first row and to group `first`. Scales are loaded a group ahead: the product waits
    for nothing that was not on its way all through the one before. Adding zero makes the first ones a result rather
    than a load; Triton 3.6 and 3.9 fail to specialize a loop that carries a load from outside it.
    """
    left_at, right_at = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    left_scales = _scale_pointers(left_scale, left_at, left_scale_row, False)
    right_scales = _scale_pointers(right_scale, right_at, right_scale_row, RIGHT_BLOCK)
    left_next = _load_scales(left_scales, left_at, left_valid, groups > 0, False) + 0.0
    right_next = _load_scales(right_scales, right_at, right_valid, groups > 0, RIGHT_BLOCK) + 0.0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in tl.range(0, groups, warp_specialize=True):
        left_now, right_now = left_next, right_next
        left_scales += left_scale_group
        right_scales += right_scale_group
        left_next = _load_scales(left_scales, left_at, left_valid, group + 1 < groups, False)
        right_next = _load_scales(right_scales, right_at, right_valid, group + 1 < groups, RIGHT_BLOCK)
        k = (first + group) * GROUP
        part = tl.dot(lefts.load([left_row, k]), rights.load([right_row, k]).T)
        total += _scaled(part, left_now, right_now, False, RIGHT_BLOCK)
    return total


@triton.jit
def store_tile(out, total, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes the first `rows` rows and `columns` columns of a tile to where `out` points."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = out + row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    tl.store(at, total.to(out.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def plain_kernel(
    left,
    left_scale,
    right,
    right_scale,
    out,
    rows,
    columns,
    depth,
    left_stride,
    right_stride,
    left_scale_row,
    left_scale_group,
    right_scale_row,
    right_scale_group,
    out_row,
    out_column,
    out_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
    LEFT_BLOCK: tl.constexpr,
    RIGHT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program, and one part of its sum: program_id(1) of num_programs(1), each to its own part of `out`."""
    row_tile, column_tile = raster(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), BAND)
    row, column = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS
    groups, split, splits = tl.cdiv(depth, GROUP), tl.program_id(1), tl.num_programs(1)
    left_at, right_at = left + row * left_stride, right + column * right_stride
    left_scale_at = left_scale + (row // GROUP if LEFT_BLOCK else row) * left_scale_row
    right_scale_at = right_scale + (column // GROUP if RIGHT_BLOCK else column) * right_scale_row
    below, beside = rows - row_tile * ROWS, columns - column_tile * COLUMNS
    total = plain_product(
        *(left_at, left_scale_at, below, left_stride, left_scale_row, left_scale_group),
        *(right_at, right_scale_at, beside, right_stride, right_scale_row, right_scale_group),
        *(groups * split // splits, groups * (split + 1) // splits, depth),
        *(ROWS, COLUMNS, GROUP, LEFT_BLOCK, RIGHT_BLOCK, STAGES),
    )
    out += split.to(tl.int64) * out_split + row * out_row + column * out_column
    store_tile(out, total, below, beside, out_row, out_column, ROWS, COLUMNS)


@triton.jit
def specialized_kernel(
    left,
    left_scale,
    right,
    right_scale,
    out,
    rows,
    columns,
    depth,
    left_stride,
    right_stride,
    left_scale_row,
    left_scale_group,
    right_scale_row,
    right_scale_group,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
    RIGHT_BLOCK: tl.constexpr,
):
    """As many programs as processors; the copying warps run ahead into the next tile while the others store."""
    lefts = tl.make_tensor_descriptor(left, [rows, depth], [left_stride, 1], [ROWS, GROUP])
    rights = tl.make_tensor_descriptor(right, [columns, depth], [right_stride, 1], [COLUMNS, GROUP])
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = raster(index, row_tiles, column_tiles, BAND)
        row, column = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS
        left_scale_at = left_scale + row * left_scale_row
        right_scale_at = right_scale + (column // GROUP if RIGHT_BLOCK else column) * right_scale_row
        below, beside = rows - row_tile * ROWS, columns - column_tile * COLUMNS
        total = specialized_product(
            *(lefts, row_tile * ROWS, left_scale_at, below, left_scale_row, left_scale_group),
            *(rights, column_tile * COLUMNS, right_scale_at, beside, right_scale_row, right_scale_group),
            *(0, tl.cdiv(depth, GROUP), ROWS, COLUMNS, GROUP, RIGHT_BLOCK),
        )
        store_tile(out + row * columns + column, total, below, beside, columns, 1, ROWS, COLUMNS)


@triton.jit
def sum_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = parts[0] + parts[1] + ..., always in this order: the same bits in every run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts + at, at < size, other=0.0)
        parts += size
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from .compile_cases import compile_cases

    return compile_cases()
