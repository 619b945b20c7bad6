"""The weights' gradient of grouped FP8 products in Triton: each expert's sum over its groups of tokens.

Operands are tuples, as for `fp8_gemm`; both have scales for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.tiles import raster
from ..fp8_gemm.kernel import GROUP, operand_at, plain_product, specialized_product, store_part


@triton.jit
def starts_kernel(ends, starts, experts, capacity, EXPERTS: tl.constexpr):
    """First group of tokens of each expert, and one past the last expert's: `starts` [E + 1] int32."""
    expert = tl.arange(0, EXPERTS)
    start = tl.load(ends + expert - 1, (expert > 0) & (expert < experts), other=0)
    end = tl.load(ends + expert, expert < experts, other=0)
    through = tl.cumsum(tl.cdiv(tl.where(expert < experts, tl.maximum(end - start, 0), 0), GROUP)).to(tl.int32)
    # Whatever `ends` holds, no group lies outside of the operands.
    tl.store(starts + expert + 1, tl.minimum(through, capacity), expert < experts)
    tl.store(starts + expert, 0, expert == 0)


@triton.jit
def _gradient_tile(index, starts, height, width, TILE: tl.constexpr, BAND: tl.constexpr):
    """Tile number `index` of the gradients: expert, row, column, first group and number of groups."""
    down, across = tl.cdiv(height, TILE[0]), tl.cdiv(width, TILE[1])
    expert = index // (down * across)
    row_tile, column_tile = raster(index % (down * across), down, across, BAND)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    return expert, row_tile * TILE[0], column_tile * TILE[1], first, last - first


@triton.jit
def plain_gradient_kernel(grad, x, out, starts, sizes, TILE: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr):
    """One tile a program of `grad @ x.T` over one expert's groups. `sizes` are height, width and depth."""
    height, width, depth = sizes
    expert, top, side, first, groups = _gradient_tile(tl.program_id(0), starts, height, width, TILE, BAND)
    row, column = top.to(tl.int64), side.to(tl.int64)
    rows, columns = tl.minimum(height - top, TILE[0]), tl.minimum(width - side, TILE[1])
    left, right = operand_at(grad, row, row), operand_at(x, column, column)
    total = plain_product(left, rows, right, columns, first, first + groups, depth, TILE, (False, False), STAGES)
    out += (expert.to(tl.int64) * height + row) * width + column
    store_part(out, total, rows, columns, width, 1, TILE)


@triton.jit
def specialized_gradient_kernel(grad, x, out, starts, experts, sizes, TILE: tl.constexpr, BAND: tl.constexpr):
    """The same, as many programs as processors: all of them are at one expert, so that experts need no balance."""
    height, width, depth = sizes
    grad_values, grad_scale, grad_stride, grad_scale_row, grad_scale_group = grad
    x_values, x_scale, x_stride, x_scale_row, x_scale_group = x
    lefts = tl.make_tensor_descriptor(grad_values, [height, depth], [grad_stride, 1], [TILE[0], GROUP])
    rights = tl.make_tensor_descriptor(x_values, [width, depth], [x_stride, 1], [TILE[1], GROUP])
    tiles = experts * tl.cdiv(height, TILE[0]) * tl.cdiv(width, TILE[1])
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, top, side, first, groups = _gradient_tile(index, starts, height, width, TILE, BAND)
        row, column, group = top.to(tl.int64), side.to(tl.int64), first.to(tl.int64)
        left_scale = grad_scale + row * grad_scale_row + group * grad_scale_group
        right_scale = x_scale + column * x_scale_row + group * x_scale_group
        total = specialized_product(
            *((lefts, top, left_scale, grad_scale_row, grad_scale_group), height - top),
            *((rights, side, right_scale, x_scale_row, x_scale_group), width - side),
            *(first, groups, TILE, False),
        )
        at = out + (expert.to(tl.int64) * height + row) * width + column
        store_part(at, total, height - top, width - side, width, 1, TILE)
