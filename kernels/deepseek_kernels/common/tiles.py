"""Tiles of products in Triton: the order in which programs take them, a table of experts' rows, storing a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import cdiv, power_of_two

__all__ = [
    "TABLE_TILES",
    "end_of",
    "expert_tile",
    "raster",
    "store_tile",
    "tile_capacity",
    "tile_table",
    "tile_table_kernel",
]

TABLE_TILES = 16  # entries of a tile table that one program computes


@triton.jit
def raster(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row tile and column tile that program number `index` takes.

    GROUP row tiles meet all column tiles before the next GROUP begins, row tiles fastest: programs that run at one time
    read few rows and few columns, and a weight leaves the L2 cache only after all row tiles of the group have read it.
    """
    group = index // (GROUP * column_tiles)
    rest = index % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + rest % height, rest // height


@triton.jit
def end_of(ends, expert, experts, rows):
    """One past an expert's last row: 0 for expert -1, `rows` for those that do not exist.

    The result is within the rows whatever `ends` holds: a wrong value cannot be refused without waiting for the device,
    and must not reach other memory.
    """
    end = tl.load(ends + expert, (expert >= 0) & (expert < experts), other=0)
    return tl.where(expert < experts, tl.minimum(tl.maximum(end, 0), rows), rows).to(tl.int32)


@triton.jit
def tile_table_kernel(
    ends, table, rows, experts, owners, capacity, BLOCK: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr
):
    """Tiles of the first `owners` experts; number `experts` has the unassigned rows, those from the last end on."""
    expert = tl.arange(0, EXPERTS)
    count = end_of(ends, expert, experts, rows) - end_of(ends, expert - 1, experts, rows)
    count = tl.where(expert < owners, count, 0)
    through = tl.cumsum(tl.cdiv(tl.maximum(count, 0), BLOCK))  # tiles up to and with this expert
    used = tl.max(through, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    before = through[None, :] <= tile[:, None]  # [TILES, EXPERTS]
    owner = tl.sum(before.to(tl.int32), 1)
    first = tl.max(tl.where(before, through[None, :], 0), 1)
    row = end_of(ends, owner - 1, experts, rows) + (tile - first) * BLOCK
    entry, valid, inside = table + 3 + tile * 3, tile < used, tile < capacity
    tl.store(entry, tl.where(valid, owner, -1), inside)
    tl.store(entry + 1, tl.where(valid, row, 0), inside)
    tl.store(entry + 2, tl.where(valid, end_of(ends, owner, experts, rows), 0), inside)
    if tl.program_id(0) == 0:
        tl.store(table + tl.arange(0, 4), tl.minimum(used, capacity), tl.arange(0, 4) < 3)


@triton.jit
def expert_tile(table, index, used, column_tiles, GROUP: tl.constexpr):
    """Tile number `index` of products whose row tiles are in a table made by `tile_table`, `used` of them.

    Returns the expert, the tile's first row, one past the expert's last row, and the tile's place among `column_tiles`.
    """
    row_tile, column_tile = raster(index, used, column_tiles, GROUP)
    entry = table + 3 + row_tile * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), column_tile


def tile_capacity(rows: int, experts: int, block: int) -> int:
    """Returns the most tiles of `block` rows that `rows` rows need, however they are distributed among experts.

    Unassigned rows count as one expert more.
    """
    return (rows + min(experts + 1, rows) * (block - 1)) // block


def tile_table(ends: Tensor, rows: int, block: int, unassigned: bool = True) -> Tensor:
    """Makes row tiles of `block` rows for each expert, on the device and without waiting for it.

    Args:
        ends: [E] integers, as for `grouped_gemm`; need not be multiples of `block`.
        rows: P, at least 1.
        block: rows of a tile; the last tile of an expert is partial: a product may read its rows beyond the expert's
            end, but must not store them.
        unassigned: whether the rows of no expert have tiles, without which no product writes them.

    Returns:
        [1 + tile_capacity(P, E, block), 3] int32. Each number of entry 0 is the number of tiles in use. Entry 1 + t
        holds tile t: its expert, its first row, and one past the last row of its expert. Experts come in order, then
        the unassigned rows, with expert E: they are to be zeros. Entries not in use hold -1, 0, 0.
    """
    experts, capacity = ends.shape[0], tile_capacity(rows, ends.shape[0], block)
    table = torch.empty(1 + capacity, 3, dtype=torch.int32, device=ends.device)
    with torch.cuda.device_of(ends):
        tile_table_kernel[(cdiv(capacity, TABLE_TILES),)](
            *(ends.contiguous(), table, rows, experts, experts + unassigned, capacity),
            BLOCK=block,
            TILES=TABLE_TILES,
            EXPERTS=power_of_two(experts + 1),
            num_warps=4,
        )
    return table


@triton.jit
def store_tile(out, result, row, end, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a tile to `out` [..., width], except rows from `end` on and columns from `width` on."""
    row = row + tl.arange(0, ROWS)
    column = column + tl.arange(0, COLUMNS)
    inside = (row < end)[:, None] & (column < width)[None, :]
    at = out + row[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, result.to(out.dtype.element_ty), inside)
