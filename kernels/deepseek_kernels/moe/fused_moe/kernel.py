"""The experts' first product with SwiGLU behind it, and the weighted sum at the end, in Triton.

The tiles of `grouped_gemm`, with two sums: a column of the result needs that column of the gate and of the up product.
Both stay in float32 until their SwiGLU is rounded. The second product is `grouped_gemm`'s own. Routing weights are not
for its epilogue: it would round what they make of a row, which the sum, that reads the rows anyway, does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..grouped_gemm.kernel import raster, store_tile, tile_of


@triton.jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def product_kernel(
    x,
    order,
    weight,
    out,
    table,
    choices,
    experts,
    width,
    depth,
    x_stride,
    expert_stride,
    width_stride,
    depth_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
):
    """One tile a program, by pointers. GATHER: sorted row r is the row of x of token `order[r] // choices`."""
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= used * column_tiles:
        return
    row_tile, column_tile = raster(tl.program_id(0), used, column_tiles, GROUP)
    expert, first, end = tile_of(table, row_tile)
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
        wanted = inside[:, None] & (column < width)[None, :]
        gate = tl.dot(a, tl.load(gates, wanted, other=0.0), gate, input_precision="ieee")
        up = tl.dot(a, tl.load(ups, wanted, other=0.0), up, input_precision="ieee")
        left += DEPTH
        gates += DEPTH * depth_stride
        ups += DEPTH * depth_stride
    store_tile(out, _swiglu(gate, up), first, end, column_tile * COLUMNS, width, ROWS, COLUMNS)


@triton.jit
def specialized_product_kernel(
    x,
    weight,
    out,
    table,
    rows,
    experts,
    width,
    depth,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As many programs as processors, rows in their places.

    Tiles may copy rows of the next expert, or of up behind gate's last: they meet only results that are not stored.
    """
    weights = tl.make_tensor_descriptor(weight, [experts * 2 * width, depth], [depth, 1], [COLUMNS, DEPTH])
    lefts = tl.make_tensor_descriptor(x, [rows, depth], [x_stride, 1], [ROWS, DEPTH])
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    for index in tl.range(tl.program_id(0), used * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = raster(index, used, column_tiles, GROUP)
        expert, row, end = tile_of(table, row_tile)
        column, base = column_tile * COLUMNS, expert * 2 * width
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, tl.where(expert < experts, depth, 0), DEPTH, warp_specialize=True):
            a = lefts.load([row, k])
            gate = tl.dot(a, weights.load([base + column, k]).T, gate)
            up = tl.dot(a, weights.load([base + width + column, k]).T, up)
        store_tile(out, _swiglu(gate, up), row, end, column, width, ROWS, COLUMNS)


@triton.jit
def sum_kernel(y, weights, inverse, ends, out, choices, experts, columns, COLUMNS: tl.constexpr):
    """One choice after the other, product and sum each rounded to float32, as `unpermute` has it.

    Rows from the last end on belong to nobody: no product wrote them, and they are not read.
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


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from .compile_cases import compile_cases

    return compile_cases()
