"""Tiles of the RMS norm: static rules on shapes, which need neither Triton nor a GPU."""

from __future__ import annotations

from ...common.fp8 import GROUP
from ...common.host import ENOUGH_PROGRAMS, cdiv, power_of_two
from ...quant.fp8_quantize.configs import Tile

__all__ = ["BACKWARD_PROGRAMS", "OPTIONS", "backward_stages", "backward_tile", "forward_tile"]

# No fusion of products into sums, which compilers choose case by case too.
OPTIONS = {"enable_fp_fusion": False}
BACKWARD_PROGRAMS = ENOUGH_PROGRAMS  # as many rows of partial sums
_SHARED = 96 * 1024  # bytes of shared memory that every GPU since compute capability 8.6 has


def forward_tile(rows: int, columns: int) -> Tile:
    """Returns a tile of whole rows, 32 values a thread; few rows get a program each."""
    width = max(GROUP, power_of_two(columns))
    many = Tile(max(1, 4096 // width), width, max(4, width // 1024))
    if cdiv(rows, many.rows) >= ENOUGH_PROGRAMS or many.rows == 1:
        return many
    return Tile(1, width, max(1, width // 512))


def backward_tile(columns: int) -> Tile:
    """Returns a tile of 16 values a thread: x, its gradient, the weight and its sums are in registers at once."""
    width = max(GROUP, power_of_two(columns))
    return Tile(max(1, 4096 // width), width, max(8, width // 512))


def backward_stages(tile: Tile, bytes_each: int) -> int:
    """Returns 3, so that rows are read while those before them are computed, or 1 if there is no memory for that.

    Args:
        bytes_each: bytes that are read for one element.
    """
    return 3 if 2 * tile.rows * tile.columns * bytes_each <= _SHARED else 1
