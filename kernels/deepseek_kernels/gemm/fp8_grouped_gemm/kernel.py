"""Grouped FP8 products in Triton: the tiles of `fp8_gemm`, for the rows of one expert each.

Row tiles come from a table that the device makes (`grouped_gemm.kernel.tile_table`): an expert's rows start anywhere,
its last tile is partial, and rows of the next expert in that tile are not stored. Weights are one matrix, [E * N, K].

Nobody's rows are tiles of expert number `experts`: a sum of no groups, which is the zeros that they are to be.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...moe.grouped_gemm.kernel import raster, tile_of
from ..fp8_gemm.kernel import plain_product, specialized_product, store_tile


@triton.jit
def _columns_of(column_tile, part_width, part_blocks, GROUP: tl.constexpr):
    """Where a tile of the weight's rows begins, and how many rows it has, none of the next part's.

    Each part has blocks of its own, so that a tile is a block: its number is that of its row of scales.
    """
    part, block = column_tile // part_blocks, column_tile % part_blocks
    return part * part_width + block * GROUP, tl.minimum(part_width - block * GROUP, GROUP)


@triton.jit
def plain_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    table,
    experts,
    width,
    depth,
    part_width,
    part_blocks,
    column_tiles,
    x_stride,
    weight_stride,
    x_scale_row,
    x_scale_group,
    weight_scale_expert,
    weight_scale_row,
    weight_scale_group,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
    SWAPPED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program. SWAPPED: the weight is on the left, and the tile of the result lies on its side."""
    used = tl.load(table)
    if tl.program_id(0) >= used * column_tiles:
        return
    row_tile, column_tile = raster(tl.program_id(0), used, column_tiles, BAND)
    expert, first_row, end = tile_of(table, row_tile)
    column, columns = _columns_of(column_tile, part_width, part_blocks, GROUP)
    owner, groups = tl.minimum(expert, experts - 1).to(tl.int64), tl.where(expert < experts, tl.cdiv(depth, GROUP), 0)
    row, rows = first_row.to(tl.int64), tl.minimum(end - first_row, COLUMNS if SWAPPED else ROWS)
    x += row * x_stride
    x_scale += row * x_scale_row
    weight += (owner * width + column) * weight_stride
    weight_scale += owner * weight_scale_expert + column_tile.to(tl.int64) * weight_scale_row
    out += row * width + column
    if SWAPPED:
        total = plain_product(
            *(weight, weight_scale, columns, weight_stride, weight_scale_row, weight_scale_group),
            *(x, x_scale, rows, x_stride, x_scale_row, x_scale_group),
            *(0, groups, depth, ROWS, COLUMNS, GROUP, True, False, STAGES),
        )
        store_tile(out, total, columns, rows, 1, width, ROWS, COLUMNS)
    else:
        total = plain_product(
            *(x, x_scale, rows, x_stride, x_scale_row, x_scale_group),
            *(weight, weight_scale, columns, weight_stride, weight_scale_row, weight_scale_group),
            *(0, groups, depth, ROWS, COLUMNS, GROUP, False, True, STAGES),
        )
        store_tile(out, total, rows, columns, width, 1, ROWS, COLUMNS)


@triton.jit
def specialized_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    table,
    rows,
    experts,
    width,
    depth,
    part_width,
    part_blocks,
    column_tiles,
    x_stride,
    weight_stride,
    x_scale_row,
    x_scale_group,
    weight_scale_expert,
    weight_scale_row,
    weight_scale_group,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
):
    """As many programs as processors. Tiles may copy rows of the next expert: they meet only what is not stored."""
    lefts = tl.make_tensor_descriptor(x, [rows, depth], [x_stride, 1], [ROWS, GROUP])
    rights = tl.make_tensor_descriptor(weight, [experts * width, depth], [weight_stride, 1], [COLUMNS, GROUP])
    used = tl.load(table)
    for index in tl.range(tl.program_id(0), used * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = raster(index, used, column_tiles, BAND)
        expert, first_row, end = tile_of(table, row_tile)
        column, columns = _columns_of(column_tile, part_width, part_blocks, GROUP)
        owner, row = tl.minimum(expert, experts - 1), first_row.to(tl.int64)
        left_scale = x_scale + row * x_scale_row
        right_scale = weight_scale + owner.to(tl.int64) * weight_scale_expert
        right_scale += column_tile.to(tl.int64) * weight_scale_row
        total = specialized_product(
            *(lefts, first_row, left_scale, end - first_row, x_scale_row, x_scale_group),
            *(rights, owner * width + column, right_scale, columns, weight_scale_row, weight_scale_group),
            *(0, tl.where(expert < experts, tl.cdiv(depth, GROUP), 0), ROWS, COLUMNS, GROUP, True),
        )
        store_tile(out + row * width + column, total, end - first_row, columns, width, 1, ROWS, COLUMNS)


@triton.jit
def starts_kernel(ends, starts, experts, capacity, EXPERTS: tl.constexpr, GROUP: tl.constexpr):
    """Where each expert's groups of tokens begin, and behind the last expert's: `starts` [E + 1] int32."""
    expert = tl.arange(0, EXPERTS)
    start = tl.load(ends + expert - 1, (expert > 0) & (expert < experts), other=0)
    end = tl.load(ends + expert, expert < experts, other=0)
    through = tl.cumsum(tl.cdiv(tl.where(expert < experts, tl.maximum(end - start, 0), 0), GROUP)).to(tl.int32)
    # Whatever `ends` holds, no group lies outside of the operands.
    tl.store(starts + expert + 1, tl.minimum(through, capacity), expert < experts)
    tl.store(starts + expert, 0, expert == 0)


@triton.jit
def _gradient_tile(index, starts, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """Tile number `index` of the gradients: expert, row, column, first group and number of groups."""
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    expert = index // (down * across)
    row_tile, column_tile = raster(index % (down * across), down, across, BAND)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    return expert, row_tile * ROWS, column_tile * COLUMNS, first, last - first


@triton.jit
def plain_gradient_kernel(
    grad,
    grad_scale,
    x,
    x_scale,
    out,
    starts,
    height,
    width,
    depth,
    grad_stride,
    x_stride,
    grad_scale_row,
    grad_scale_group,
    x_scale_row,
    x_scale_group,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program of `grad @ x.T` over one expert's groups; both have scales for each row."""
    expert, top, side, first, groups = _gradient_tile(tl.program_id(0), starts, height, width, ROWS, COLUMNS, BAND)
    row, column = top.to(tl.int64), side.to(tl.int64)
    left, left_scale = grad + row * grad_stride, grad_scale + row * grad_scale_row
    right, right_scale = x + column * x_stride, x_scale + column * x_scale_row
    rows, columns = tl.minimum(height - top, ROWS), tl.minimum(width - side, COLUMNS)
    total = plain_product(
        *(left, left_scale, rows, grad_stride, grad_scale_row, grad_scale_group),
        *(right, right_scale, columns, x_stride, x_scale_row, x_scale_group),
        *(first, first + groups, depth, ROWS, COLUMNS, GROUP, False, False, STAGES),
    )
    out += (expert.to(tl.int64) * height + row) * width + column
    store_tile(out, total, rows, columns, width, 1, ROWS, COLUMNS)


@triton.jit
def specialized_gradient_kernel(
    grad,
    grad_scale,
    x,
    x_scale,
    out,
    starts,
    experts,
    height,
    width,
    depth,
    grad_stride,
    x_stride,
    grad_scale_row,
    grad_scale_group,
    x_scale_row,
    x_scale_group,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BAND: tl.constexpr,
):
    """The same, as many programs as processors: all of them are at one expert, so that experts need no balance."""
    lefts = tl.make_tensor_descriptor(grad, [height, depth], [grad_stride, 1], [ROWS, GROUP])
    rights = tl.make_tensor_descriptor(x, [width, depth], [x_stride, 1], [COLUMNS, GROUP])
    tiles = experts * tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, top, side, first, groups = _gradient_tile(index, starts, height, width, ROWS, COLUMNS, BAND)
        row, column, group = top.to(tl.int64), side.to(tl.int64), first.to(tl.int64)
        left_scale = grad_scale + row * grad_scale_row + group * grad_scale_group
        right_scale = x_scale + column * x_scale_row + group * x_scale_group
        total = specialized_product(
            *(lefts, top, left_scale, height - top, grad_scale_row, grad_scale_group),
            *(rights, side, right_scale, width - side, x_scale_row, x_scale_group),
            *(first, groups, ROWS, COLUMNS, GROUP, False),
        )
        at = out + (expert.to(tl.int64) * height + row) * width + column
        store_tile(at, total, height - top, width - side, width, 1, ROWS, COLUMNS)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from .compile_cases import compile_cases

    return compile_cases()
