"""Grouped products in Triton: a device-side table of row tiles, the product itself, and the weights' gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.scratch import with_scratch
from .backward import connect
from .configs import GROUP, WIDE, Config, gradient_config, product_config, rows_aligned

_TILES = 16  # table entries that one program of `_tile_table_kernel` computes


@triton.jit
def _end_of(ends, expert, experts, rows):
    """One past an expert's last row: 0 for expert -1, `rows` for those that do not exist.

    Within the rows whatever `ends` holds: what cannot be refused without waiting for the device must not reach other
    memory.
    """
    end = tl.load(ends + expert, (expert >= 0) & (expert < experts), other=0)
    return tl.where(expert < experts, tl.minimum(tl.maximum(end, 0), rows), rows).to(tl.int32)


@triton.jit
def _tile_table_kernel(
    ends, table, rows, experts, owners, capacity, BLOCK: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr
):
    """Tiles of the first `owners`. Expert number `experts` stands for nobody: it owns the rows from the last end on."""
    expert = tl.arange(0, EXPERTS)
    count = _end_of(ends, expert, experts, rows) - _end_of(ends, expert - 1, experts, rows)
    count = tl.where(expert < owners, count, 0)
    through = tl.cumsum(tl.cdiv(tl.maximum(count, 0), BLOCK))  # tiles up to and with this expert
    used = tl.max(through, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    before = through[None, :] <= tile[:, None]  # [TILES, EXPERTS]
    owner = tl.sum(before.to(tl.int32), 1)
    first = tl.max(tl.where(before, through[None, :], 0), 1)
    row = _end_of(ends, owner - 1, experts, rows) + (tile - first) * BLOCK
    entry, valid, inside = table + 3 + tile * 3, tile < used, tile < capacity
    tl.store(entry, tl.where(valid, owner, -1), inside)
    tl.store(entry + 1, tl.where(valid, row, 0), inside)
    tl.store(entry + 2, tl.where(valid, _end_of(ends, owner, experts, rows), 0), inside)
    if tl.program_id(0) == 0:
        tl.store(table + tl.arange(0, 4), tl.minimum(used, capacity), tl.arange(0, 4) < 3)


@triton.jit
def raster(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Which row tile and which column tile the program number `index` takes.

    GROUP row tiles meet all column tiles before the next GROUP begins, row tiles fastest: what runs at one time reads
    few rows and few columns, and a weight leaves the L2 cache only after all row tiles of the group have read it.
    """
    group = index // (GROUP * column_tiles)
    rest = index % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + rest % height, rest // height


@triton.jit
def tile_of(table, tile):
    """Entry `tile` of a table made by `tile_table`: the expert, the first row, and one past the expert's last row."""
    entry = table + 3 + tile * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


def tile_capacity(rows: int, experts: int, block: int) -> int:
    """The most tiles of `block` rows that `rows` rows need, however they are shared out among experts and nobody."""
    return (rows + min(experts + 1, rows) * (block - 1)) // block


def tile_table(ends: Tensor, rows: int, block: int, nobody: bool = True) -> Tensor:
    """Row tiles of `block` rows for each expert, computed on the device, without waiting for it.

    Args:
        ends: [E] integers, as for `grouped_gemm`; need not be multiples of `block`.
        rows: P, at least 1.
        block: rows of a tile; the last tile of an expert is partial, and its rows beyond the expert's end are not its
            own: read them if you like, do not store them.
        nobody: whether rows that belong to nobody have tiles, without which no product writes them.

    Returns:
        [1 + tile_capacity(P, E, block), 3] int32. Each number of entry 0 is how many tiles are in use. Entry 1 + t
        holds tile t: its expert, its first row, and one past the last row of its expert. Experts come in order, then
        the rows that belong to nobody, with expert E: they are to be zeros. Entries not in use hold -1, 0, 0.
    """
    experts, capacity = ends.shape[0], tile_capacity(rows, ends.shape[0], block)
    table = torch.empty(1 + capacity, 3, dtype=torch.int32, device=ends.device)
    with torch.cuda.device_of(ends):
        _tile_table_kernel[(triton.cdiv(capacity, _TILES),)](
            *(ends.contiguous(), table, rows, experts, experts + nobody, capacity),
            BLOCK=block,
            TILES=_TILES,
            EXPERTS=triton.next_power_of_2(experts + 1),
            num_warps=4,
        )
    return table


@triton.jit
def store_tile(out, result, row, end, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a tile to `out` [..., width], rows from `end` on and columns from `width` on left out."""
    row = row + tl.arange(0, ROWS)
    column = column + tl.arange(0, COLUMNS)
    inside = (row < end)[:, None] & (column < width)[None, :]
    at = out + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, result.to(out.dtype.element_ty), inside)


@triton.jit
def _product_kernel(
    x,
    weight,
    out,
    table,
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
):
    """One tile a program, by pointers: any strides of the weight, any sizes."""
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    if tl.program_id(0) >= used * column_tiles:
        return
    row_tile, column_tile = raster(tl.program_id(0), used, column_tiles, GROUP)
    expert, first, end = tile_of(table, row_tile)
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
def _specialized_product_kernel(
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
    BACKWARD: tl.constexpr,
):
    """As many programs as processors; the copying warps run ahead into the next tile while the others store.

    A tile may copy rows of the next expert, or columns of its weight: they meet only results that are not stored.
    `depth` does not run over into the next weight: forward its end is the descriptor's, backward it is whole steps.
    """
    if BACKWARD:
        weights = tl.make_tensor_descriptor(weight, [experts * depth, width], [width, 1], [DEPTH, COLUMNS])
    else:
        weights = tl.make_tensor_descriptor(weight, [experts * width, depth], [depth, 1], [COLUMNS, DEPTH])
    lefts = tl.make_tensor_descriptor(x, [rows, depth], [x_stride, 1], [ROWS, DEPTH])
    used, column_tiles = tl.load(table), tl.cdiv(width, COLUMNS)
    for index in tl.range(tl.program_id(0), used * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = raster(index, used, column_tiles, GROUP)
        expert, row, end = tile_of(table, row_tile)
        column, base = column_tile * COLUMNS, expert * (depth if BACKWARD else width)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, tl.where(expert < experts, depth, 0), DEPTH, warp_specialize=True):
            a = lefts.load([row, k])
            b = weights.load([base + k, column]) if BACKWARD else weights.load([base + column, k]).T
            total = tl.dot(a, b, total)
        store_tile(out, total, row, end, column, width, ROWS, COLUMNS)


@triton.jit
def _gradient_tile(ends, rows, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Of one program of the weights' gradient: the expert, its rows, and where its tile [ROWS, COLUMNS] begins."""
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    expert = tl.program_id(0) // (down * across)
    row_tile, column_tile = raster(tl.program_id(0) % (down * across), down, across, GROUP)
    start, end = _end_of(ends, expert - 1, expert + 1, rows), _end_of(ends, expert, expert + 1, rows)
    return expert, start, end, row_tile * ROWS, column_tile * COLUMNS


@triton.jit
def _gradient_kernel(
    grad,
    x,
    out,
    ends,
    rows,
    height,
    width,
    grad_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`grad.T @ x` over one expert's rows, one tile a program, by pointers."""
    expert, start, end, top, side = _gradient_tile(ends, rows, height, width, ROWS, COLUMNS, GROUP)
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
def _specialized_gradient_kernel(
    grad,
    x,
    out,
    ends,
    rows,
    height,
    width,
    grad_stride,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The same through descriptors that end where the expert's rows end: rows beyond come as zeros."""
    expert, start, end, top, side = _gradient_tile(ends, rows, height, width, ROWS, COLUMNS, GROUP)
    limit = tl.maximum(end, 1)
    lefts = tl.make_tensor_descriptor(grad, [limit, height], [grad_stride, 1], [DEPTH, ROWS])
    rights = tl.make_tensor_descriptor(x, [limit, width], [x_stride, 1], [DEPTH, COLUMNS])
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in tl.range(start, end, DEPTH, warp_specialize=True):
        total = tl.dot(lefts.load([row, top]).T, rights.load([row, side]), total)
    store_tile(out + expert.to(tl.int64) * height * width, total, top, height, side, width, ROWS, COLUMNS)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def options(config: Config) -> dict[str, int]:
    """What every kernel of products is launched with."""
    stages = config.stages(hip=torch.version.hip is not None)
    return {**config.blocks, "GROUP": GROUP, "num_warps": config.num_warps, "num_stages": stages}


def rows_readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def product(x: Tensor, weight: Tensor, table_of: Callable[[int], Tensor], backward: bool = False) -> Tensor:
    """Each expert's rows of x [P, D] times its weight, [E, W, D] forward and [E, D, W] backward -> [P, W].

    Args:
        table_of: the `tile_table` for a number of rows.
    """
    x, (rows, depth), experts = rows_readable(x), x.shape, weight.shape[0]
    width_at, depth_at = (2, 1) if backward else (1, 2)
    width = weight.shape[width_at]
    out = x.new_empty(rows, width)
    if not out.numel():
        return out
    aligned = weight.is_contiguous() and rows_aligned(x, weight.flatten(0, 1))
    specialized = _hopper(x.device) and not (backward and depth % WIDE.depth)
    config = product_config(rows, experts, width, aligned, specialized)
    table = table_of(config.rows)
    tiles = (table.shape[0] - 1) * triton.cdiv(width, config.columns)
    with torch.cuda.device_of(x):
        if config.specialized:
            arguments = (x, weight, out, table, rows, experts, width, depth, x.stride(0))
            programs = min(tiles, processors(x.device))
            with_scratch(
                lambda: _specialized_product_kernel[(programs,)](*arguments, BACKWARD=backward, **options(config))
            )
        else:
            strides = x.stride(0), weight.stride(0), weight.stride(width_at), weight.stride(depth_at)
            _product_kernel[(tiles,)](x, weight, out, table, experts, width, depth, *strides, **options(config))
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grad [P, N] and x [P, K] -> [E, N, K]."""
    grad, x, out = rows_readable(grad), rows_readable(x), weight.new_empty(weight.shape)
    if not out.numel():
        return out
    (experts, height, width), rows = weight.shape, x.shape[0]
    config = gradient_config(rows, experts, x.element_size() == 2, rows_aligned(grad, x) and _hopper(x.device))
    kernel = _specialized_gradient_kernel if config.specialized else _gradient_kernel
    programs = experts * triton.cdiv(height, config.rows) * triton.cdiv(width, config.columns)
    with torch.cuda.device_of(x):
        arguments = (grad, x, out, ends.contiguous(), rows, height, width, grad.stride(0), x.stride(0))
        with_scratch(lambda: kernel[(programs,)](*arguments, **options(config)))
    return out


@torch.library.custom_op("deepseek_kernels::grouped_gemm_triton", mutates_args=())
def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return product(x, weight, functools.partial(tile_table, ends, x.shape[0]))


@torch.library.custom_op("deepseek_kernels::grouped_gemm_triton_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    table_of = functools.partial(tile_table, ends, x.shape[0])
    grad_x = product(grad, weight, table_of, backward=True) if need_x else x.new_empty(0)
    return grad_x, _weight_gradient(grad, x, weight, ends) if need_weight else weight.new_empty(0)


connect(grouped_gemm, _backward)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from .compile_cases import compile_cases

    return compile_cases()
