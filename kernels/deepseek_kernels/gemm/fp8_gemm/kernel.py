"""FP8 products in Triton. All of them are `total += dot(128 FP8 values, 128 FP8 values) * scales`.

A tensor core adds FP8 products with some 14 bits; sums of more than 128 terms are therefore taken in float32, with the
scales, by the ordinary arithmetic units (V3 report, section 3.3; TRAPS E8). `tl.dot` is never given the total: that
would move the long sum back into the tensor core.

Left and right operands are both stored with the summed dimension last, as FP8 `wgmma` needs it. Their rows start at
multiples of 16 bytes, and the summed dimension is a multiple of 16 (`launch.aligned`). Scales come for each row, or,
with LEFT_BLOCK or RIGHT_BLOCK, one for the whole tile of that operand.

An operand is a tuple: values, scales, and the strides of a row of values, a row of scales and a group of scales.
TILE is (rows, columns); GROUP is the number of values that share a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common import fp8
from ...common.tiles import raster

GROUP = tl.constexpr(fp8.GROUP)


@triton.jit
def _scaled(part, left, right, LEFT_BLOCK: tl.constexpr, RIGHT_BLOCK: tl.constexpr):
    """A product times its scales; one multiplication for each element where either is a single number."""
    if RIGHT_BLOCK:
        return part * (left * right)[:, None]
    elif LEFT_BLOCK:
        return part * (right * left)[None, :]
    else:
        return part * left[:, None] * right[None, :]


@triton.jit
def _scale_pointers(scale, row, row_stride, BLOCK: tl.constexpr):
    """Pointers to the scales of these rows of a tile, or of the block that the tile is in."""
    if BLOCK:
        return scale
    else:
        return scale + row.to(tl.int64) * row_stride


@triton.jit
def _load_scales(pointers, row, valid, more, BLOCK: tl.constexpr):
    """Scales; zeros for rows from `valid` on, and for all rows if `more` is false."""
    if BLOCK:
        return tl.load(pointers, more, other=0.0)
    else:
        return tl.load(pointers, row < tl.where(more, valid, 0), other=0.0)


@triton.jit
def plain_product(
    left,
    left_valid,
    right,
    right_valid,
    first,
    last,
    depth,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile, groups `first` to `last` of it, by operands that point to the tile's first rows.

    Rows beyond the valid ones, of which there is one at least, are read as the last valid one: no mask in the loop, and
    a result that is not stored. BLOCKS is (LEFT_BLOCK, RIGHT_BLOCK).
    """
    left_values, left_scale, left_stride, left_scale_row, left_scale_group = left
    right_values, right_scale, right_stride, right_scale_row, right_scale_group = right
    k = tl.arange(0, GROUP)
    left_row = tl.minimum(tl.arange(0, TILE[0]), left_valid - 1)
    right_row = tl.minimum(tl.arange(0, TILE[1]), right_valid - 1)
    first_group = tl.cast(first, tl.int64)
    left_codes = left_values + left_row[:, None].to(tl.int64) * left_stride + (first_group * GROUP + k)[None, :]
    right_codes = right_values + right_row[:, None].to(tl.int64) * right_stride + (first_group * GROUP + k)[None, :]
    left_scales = _scale_pointers(left_scale, left_row, left_scale_row, BLOCKS[0])
    right_scales = _scale_pointers(right_scale, right_row, right_scale_row, BLOCKS[1])
    left_scales += first_group * left_scale_group
    right_scales += first_group * right_scale_group
    total = tl.zeros(TILE, tl.float32)
    # Written here, and not at the launch only, the number of stages holds for the scales too.
    for group in tl.range(first, last, num_stages=STAGES):
        inside = (k < depth - group * GROUP)[None, :]
        part = tl.dot(tl.load(left_codes, inside, other=0.0), tl.load(right_codes, inside, other=0.0).T)
        total += _scaled(part, tl.load(left_scales), tl.load(right_scales), BLOCKS[0], BLOCKS[1])
        left_codes += GROUP
        right_codes += GROUP
        left_scales += left_scale_group
        right_scales += right_scale_group
    return total


@triton.jit
def specialized_product(
    left, left_valid, right, right_valid, first, groups, TILE: tl.constexpr, RIGHT_BLOCK: tl.constexpr
):
    """One tile, `groups` groups of it from `first` on.

    Operands are here: a descriptor, which reads zeros beyond the values, the tile's first row in it, a pointer to the
    scale of that row and of group `first`, and the strides of a row and a group of scales.

    Scales are loaded a group ahead: the product waits only for loads that were under way all through the one before.
    Adding zero makes the first ones a result rather than a load; Triton 3.6 and 3.9 fail to specialize a loop that
    carries a load from outside it.
    """
    lefts, left_row, left_scale, left_scale_row, left_scale_group = left
    rights, right_row, right_scale, right_scale_row, right_scale_group = right
    left_at, right_at = tl.arange(0, TILE[0]), tl.arange(0, TILE[1])
    left_scales = _scale_pointers(left_scale, left_at, left_scale_row, False)
    right_scales = _scale_pointers(right_scale, right_at, right_scale_row, RIGHT_BLOCK)
    left_next = _load_scales(left_scales, left_at, left_valid, groups > 0, False) + 0.0
    right_next = _load_scales(right_scales, right_at, right_valid, groups > 0, RIGHT_BLOCK) + 0.0
    total = tl.zeros(TILE, tl.float32)
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
def store_part(out, total, rows, columns, row_stride, column_stride, TILE: tl.constexpr):
    """Writes the first `rows` rows and `columns` columns of a tile to the place that `out` points to."""
    row, column = tl.arange(0, TILE[0]), tl.arange(0, TILE[1])
    at = out + row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    tl.store(at, total.to(out.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def operand_at(operand, row, scale_row):
    """The operand from row number `row` on, its scales from number `scale_row` on."""
    values, scale, stride, scale_row_stride, scale_group = operand
    return values + row * stride, scale + scale_row * scale_row_stride, stride, scale_row_stride, scale_group


@triton.jit
def plain_kernel(
    left,
    right,
    out,
    sizes,
    out_strides,
    TILE: tl.constexpr,
    BAND: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program, and one part of its sum: program_id(1) of num_programs(1), each to its own part of `out`.

    `sizes` are rows, columns and depth, `out_strides` of row, column and part; BAND row tiles share their columns.
    """
    rows, columns, depth = sizes
    out_row, out_column, out_split = out_strides
    row_tile, column_tile = raster(tl.program_id(0), tl.cdiv(rows, TILE[0]), tl.cdiv(columns, TILE[1]), BAND)
    row, column = row_tile.to(tl.int64) * TILE[0], column_tile.to(tl.int64) * TILE[1]
    groups, split, splits = tl.cdiv(depth, GROUP), tl.program_id(1), tl.num_programs(1)
    left = operand_at(left, row, row // GROUP if BLOCKS[0] else row)
    right = operand_at(right, column, column // GROUP if BLOCKS[1] else column)
    below, beside = rows - row_tile * TILE[0], columns - column_tile * TILE[1]
    first, last = groups * split // splits, groups * (split + 1) // splits
    total = plain_product(left, below, right, beside, first, last, depth, TILE, BLOCKS, STAGES)
    out += split.to(tl.int64) * out_split + row * out_row + column * out_column
    store_part(out, total, below, beside, out_row, out_column, TILE)


@triton.jit
def specialized_kernel(left, right, out, sizes, TILE: tl.constexpr, BAND: tl.constexpr, RIGHT_BLOCK: tl.constexpr):
    """As many programs as processors; the copying warps run ahead into the next tile while the others store."""
    rows, columns, depth = sizes
    left_values, left_scale, left_stride, left_scale_row, left_scale_group = left
    right_values, right_scale, right_stride, right_scale_row, right_scale_group = right
    lefts = tl.make_tensor_descriptor(left_values, [rows, depth], [left_stride, 1], [TILE[0], GROUP])
    rights = tl.make_tensor_descriptor(right_values, [columns, depth], [right_stride, 1], [TILE[1], GROUP])
    row_tiles, column_tiles = tl.cdiv(rows, TILE[0]), tl.cdiv(columns, TILE[1])
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = raster(index, row_tiles, column_tiles, BAND)
        row, column = row_tile.to(tl.int64) * TILE[0], column_tile.to(tl.int64) * TILE[1]
        left_scale_at = left_scale + row * left_scale_row
        right_scale_at = right_scale + (column // GROUP if RIGHT_BLOCK else column) * right_scale_row
        below, beside = rows - row_tile * TILE[0], columns - column_tile * TILE[1]
        total = specialized_product(
            *((lefts, row_tile * TILE[0], left_scale_at, left_scale_row, left_scale_group), below),
            *((rights, column_tile * TILE[1], right_scale_at, right_scale_row, right_scale_group), beside),
            *(0, tl.cdiv(depth, GROUP), TILE, RIGHT_BLOCK),
        )
        store_part(out + row * columns + column, total, below, beside, columns, 1, TILE)


@triton.jit
def sum_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = parts[0] + parts[1] + ..., always in this order: the same bits in every run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts + at, at < size, other=0.0)
        parts += size
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)
