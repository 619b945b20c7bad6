"""The weights' gradient of grouped products in Triton: each expert's sum over its rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.tiles import end_of, raster, store_tile


@triton.jit
def _gradient_tile(ends, sizes, TILE: tl.constexpr):
    """The expert of this program, its rows, and where the program's tile of the gradient begins."""
    rows, height, width = sizes
    down, across = tl.cdiv(height, TILE[0]), tl.cdiv(width, TILE[1])
    expert = tl.program_id(0) // (down * across)
    row_tile, column_tile = raster(tl.program_id(0) % (down * across), down, across, TILE[3])
    start, end = end_of(ends, expert - 1, expert + 1, rows), end_of(ends, expert, expert + 1, rows)
    return expert, start, end, row_tile * TILE[0], column_tile * TILE[1]


@triton.jit
def gradient_kernel(grad, x, out, ends, sizes, strides, TILE: tl.constexpr):
    """`grad.T @ x` over one expert's rows, one tile a program, by pointers.

    `sizes` are rows and a weight's height and width; `strides` are those of rows of grad and x; TILE is as for
    products.
    """
    _, height, width = sizes
    grad_stride, x_stride = strides
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    expert, start, end, top, side = _gradient_tile(ends, sizes, TILE)
    down, across = top + tl.arange(0, ROWS), side + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(start, end, DEPTH):
        row = (first + tl.arange(0, DEPTH)).to(tl.int64)
        mine = row < end
        a = tl.load(grad + row[None, :] * grad_stride + down[:, None], mine[None, :] & (down < height)[:, None], 0.0)
        b = tl.load(x + row[:, None] * x_stride + across[None, :], mine[:, None] & (across < width)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    store_tile(out + expert.to(tl.int64) * height * width, total, top, height, side, width, ROWS, COLUMNS)


@triton.jit
def specialized_gradient_kernel(grad, x, out, ends, sizes, strides, TILE: tl.constexpr):
    """`gradient_kernel` by descriptors that end where the expert's rows end: rows beyond come as zeros."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    _, height, width = sizes
    grad_stride, x_stride = strides
    expert, start, end, top, side = _gradient_tile(ends, sizes, TILE)
    limit = tl.maximum(end, 1)
    lefts = tl.make_tensor_descriptor(grad, [limit, height], [grad_stride, 1], [DEPTH, ROWS])
    rights = tl.make_tensor_descriptor(x, [limit, width], [x_stride, 1], [DEPTH, COLUMNS])
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in tl.range(start, end, DEPTH, warp_specialize=True):
        total = tl.dot(lefts.load([row, top]).T, rights.load([row, side]), total)
    store_tile(out + expert.to(tl.int64) * height * width, total, top, height, side, width, ROWS, COLUMNS)
