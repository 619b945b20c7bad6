"""First product of the experts with SwiGLU behind it, and the weighted sum at the end, in Triton.

The tiles of `grouped_gemm`, with two sums: a column of the result needs that column of the gate and of the up product.
Both stay in float32 until their SwiGLU is rounded. The second product is `grouped_gemm`'s own. Routing weights do not
belong into its epilogue: a weighted row would be rounded there, and is not in the sum, which reads the rows anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.tiles import expert_tile, store_tile


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up, float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def swiglu_product_kernel(
    x, order, weight, out, table, choices, sizes, x_stride, weight_strides, TILE: tl.constexpr, GATHER: tl.constexpr
):
    """One tile a program, by pointers. With GATHER, sorted row r is the row of x of token `order[r] // choices`.

    `sizes`, `weight_strides` and TILE are as for `grouped_gemm`'s kernels; width is that of the result.
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    experts, width, depth = sizes
    expert_stride, width_stride, depth_stride = weight_strides
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= used * column_tiles:
        return
    expert, first, end, column_tile = expert_tile(table, tl.program_id(0), used, column_tiles, TILE[3])
    row = first + tl.arange(0, ROWS)
    token = tl.load(order + row, row < end, other=0) // choices if GATHER else row.to(tl.int64)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    left = x + token[:, None] * x_stride + k[None, :]
    matrices = weight + expert.to(tl.int64) * expert_stride + k[:, None].to(tl.int64) * depth_stride
    gates = matrices + column[None, :].to(tl.int64) * width_stride
    ups = matrices + (column + width)[None, :].to(tl.int64) * width_stride
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, tl.where(expert < experts, depth, 0), DEPTH):
        inside = k < depth - start
        a = tl.load(left, (row < end)[:, None] & inside[None, :], other=0.0)
        weight_inside = inside[:, None] & (column < width)[None, :]
        gate = tl.dot(a, tl.load(gates, weight_inside, other=0.0), gate, input_precision="ieee")
        up = tl.dot(a, tl.load(ups, weight_inside, other=0.0), up, input_precision="ieee")
        left += DEPTH
        gates += DEPTH * depth_stride
        ups += DEPTH * depth_stride
    store_tile(out, swiglu(gate, up), first, end, column_tile * COLUMNS, width, ROWS, COLUMNS)


@triton.jit
def specialized_swiglu_product_kernel(x, weight, out, table, rows, sizes, x_stride, TILE: tl.constexpr):
    """As many programs as processors, rows in their places.

    Tiles may copy rows of the next expert, or of up behind gate's last: they meet only results that are not stored.
    """
    experts, width, depth = sizes
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    DEPTH: tl.constexpr = TILE[2]
    weights = tl.make_tensor_descriptor(weight, [experts * 2 * width, depth], [depth, 1], [COLUMNS, DEPTH])
    lefts = tl.make_tensor_descriptor(x, [rows, depth], [x_stride, 1], [ROWS, DEPTH])
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    for index in tl.range(tl.program_id(0), used * column_tiles, tl.num_programs(0)):
        expert, row, end, column_tile = expert_tile(table, index, used, column_tiles, TILE[3])
        column, base = column_tile * COLUMNS, expert * 2 * width
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, tl.where(expert < experts, depth, 0), DEPTH, warp_specialize=True):
            a = lefts.load([row, k])
            gate = tl.dot(a, weights.load([base + column, k]).T, gate)
            up = tl.dot(a, weights.load([base + width + column, k]).T, up)
        store_tile(out, swiglu(gate, up), row, end, column, width, ROWS, COLUMNS)


@triton.jit
def sum_kernel(y, weights, inverse, ends, out, choices, experts, columns, COLUMNS: tl.constexpr):
    """One choice after the other, product and sum each rounded to float32, as `unpermute` does it.

    Rows from the last end on belong to no expert: no product wrote them, and they are not read.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    served = tl.load(ends + experts - 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.range(choices, loop_unroll_factor=8):
        row = tl.load(inverse + token * choices + choice)
        inside = column < tl.where(row < served, columns, 0)
        values = tl.load(y + row * columns + column, inside, other=0.0).to(tl.float32)
        total += values * tl.load(weights + token * choices + choice).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), column < columns)
