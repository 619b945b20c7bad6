"""Grouped products in Triton: a row tile of one expert at a time, from the table that `common.tiles` makes."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.tiles import expert_tile, store_tile


@triton.jit
def product_kernel(x, weight, out, table, sizes, x_stride, weight_strides, TILE: tl.constexpr):
    """One tile a program, by pointers: any strides of the weight, any sizes.

    `sizes` are experts, width (columns of the result) and depth (what is summed over); `weight_strides` are of expert,
    width and depth; TILE is (rows, columns, depth, raster group).
    """
    experts, width, depth = sizes
    expert_stride, width_stride, depth_stride = weight_strides
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= used * column_tiles:
        return
    expert, first, end, column_tile = expert_tile(table, tl.program_id(0), used, column_tiles, TILE[3])
    row = first + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    left = x + row[:, None].to(tl.int64) * x_stride + k[None, :]
    right = weight + expert.to(tl.int64) * expert_stride
    right += k[:, None].to(tl.int64) * depth_stride + column[None, :].to(tl.int64) * width_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, tl.where(expert < experts, depth, 0), DEPTH):
        inside = k < depth - start
        a = tl.load(left, (row < end)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, inside[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")  # of float32: not rounded to TF32
        left += DEPTH
        right += DEPTH * depth_stride
    store_tile(out, total, first, end, column_tile * COLUMNS, width, ROWS, COLUMNS)


@triton.jit
def specialized_product_kernel(
    x, weight, out, table, rows, sizes, x_stride, TILE: tl.constexpr, BACKWARD: tl.constexpr
):
    """As many programs as processors; the copying warps run ahead into the next tile while the others store.

    A tile may copy rows of the next expert, or columns of its weight: they meet only results that are not stored.
    `depth` does not run over into the next weight: forward its end is the descriptor's, backward it is whole steps.
    """
    experts, width, depth = sizes
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    if BACKWARD:
        weights = tl.make_tensor_descriptor(weight, [experts * depth, width], [width, 1], [DEPTH, COLUMNS])
    else:
        weights = tl.make_tensor_descriptor(weight, [experts * width, depth], [depth, 1], [COLUMNS, DEPTH])
    lefts = tl.make_tensor_descriptor(x, [rows, depth], [x_stride, 1], [ROWS, DEPTH])
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    for index in tl.range(tl.program_id(0), used * column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = expert_tile(table, index, used, column_tiles, TILE[3])
        column, base = column_tile * COLUMNS, expert * (depth if BACKWARD else width)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, tl.where(expert < experts, depth, 0), DEPTH, warp_specialize=True):
            a = lefts.load([row, k])
            b = weights.load([base + k, column]) if BACKWARD else weights.load([base + column, k]).T
            total = tl.dot(a, b, total)
        store_tile(out, total, row, end, column, width, ROWS, COLUMNS)
