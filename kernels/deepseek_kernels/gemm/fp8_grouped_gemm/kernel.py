"""Grouped FP8 products in Triton: the tiles of `fp8_gemm`, for the rows of one expert each.

Row tiles come from a table that the device makes (`common.tiles`): an expert's rows start anywhere, its last tile is
partial, and rows of the next expert in that tile are not stored. Weights are one matrix, [E * N, K].

Unassigned rows are tiles of expert number `experts`: a sum of no groups, which gives the zeros that they are to be.
Operands are tuples, as for `fp8_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.tiles import expert_tile
from ..fp8_gemm.kernel import GROUP, operand_at, plain_product, specialized_product, store_part


@triton.jit
def _columns_of(column_tile, part_width, part_blocks):
    """First row and number of rows of a tile of the weight, none of them of the next part.

    Each part has blocks of its own, so that a tile is a block: its number is that of its row of scales.
    """
    part, block = column_tile // part_blocks, column_tile % part_blocks
    return part * part_width + block * GROUP, tl.minimum(part_width - block * GROUP, GROUP)


@triton.jit
def plain_kernel(
    x,
    weight,
    out,
    table,
    sizes,
    parts,
    expert_stride,
    TILE: tl.constexpr,
    BAND: tl.constexpr,
    SWAPPED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile a program. With SWAPPED, the weight is on the left, and the tile of the result is transposed.

    `sizes` are experts, width and depth; `parts` are a part's rows and tiles of a weight, and the tiles of all parts;
    `expert_stride` is that of the weight's scales.
    """
    experts, width, depth = sizes
    part_width, part_blocks, column_tiles = parts
    used = tl.load(table)
    if tl.program_id(0) >= used * column_tiles:
        return
    expert, first_row, end, column_tile = expert_tile(table, tl.program_id(0), used, column_tiles, BAND)
    column, columns = _columns_of(column_tile, part_width, part_blocks)
    owner, groups = tl.minimum(expert, experts - 1).to(tl.int64), tl.where(expert < experts, tl.cdiv(depth, GROUP), 0)
    row, rows = first_row.to(tl.int64), tl.minimum(end - first_row, TILE[1] if SWAPPED else TILE[0])
    values, scale, stride, scale_row, scale_group = weight
    weight = operand_at(
        (values, scale + owner * expert_stride, stride, scale_row, scale_group),
        owner * width + column,
        column_tile.to(tl.int64),
    )
    x = operand_at(x, row, row)
    out += row * width + column
    if SWAPPED:
        total = plain_product(weight, columns, x, rows, 0, groups, depth, TILE, (True, False), STAGES)
        store_part(out, total, columns, rows, 1, width, TILE)
    else:
        total = plain_product(x, rows, weight, columns, 0, groups, depth, TILE, (False, True), STAGES)
        store_part(out, total, rows, columns, width, 1, TILE)


@triton.jit
def specialized_kernel(
    x, weight, out, table, rows, sizes, parts, expert_stride, TILE: tl.constexpr, BAND: tl.constexpr
):
    """As many programs as processors. Tiles may copy rows of the next expert: they meet only results not stored."""
    experts, width, depth = sizes
    part_width, part_blocks, column_tiles = parts
    x_values, x_scale, x_stride, x_scale_row, x_scale_group = x
    values, scale, stride, scale_row, scale_group = weight
    lefts = tl.make_tensor_descriptor(x_values, [rows, depth], [x_stride, 1], [TILE[0], GROUP])
    rights = tl.make_tensor_descriptor(values, [experts * width, depth], [stride, 1], [TILE[1], GROUP])
    used = tl.load(table)
    for index in tl.range(tl.program_id(0), used * column_tiles, tl.num_programs(0)):
        expert, first_row, end, column_tile = expert_tile(table, index, used, column_tiles, BAND)
        column, columns = _columns_of(column_tile, part_width, part_blocks)
        owner, row = tl.minimum(expert, experts - 1), first_row.to(tl.int64)
        left_scale = x_scale + row * x_scale_row
        right_scale = scale + owner.to(tl.int64) * expert_stride
        right_scale += column_tile.to(tl.int64) * scale_row
        total = specialized_product(
            *((lefts, first_row, left_scale, x_scale_row, x_scale_group), end - first_row),
            *((rights, owner * width + column, right_scale, scale_row, scale_group), columns),
            *(0, tl.where(expert < experts, tl.cdiv(depth, GROUP), 0), TILE, True),
        )
        store_part(out + row * width + column, total, end - first_row, columns, width, 1, TILE)
