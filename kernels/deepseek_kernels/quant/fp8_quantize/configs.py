"""Tiles of the quantization: static rules on shapes, which need neither Triton nor a GPU.

Chosen from the compile gate's registers (programs that share a multiprocessor) and instructions for each value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...common.fp8 import GROUP
from ...common.host import ENOUGH_PROGRAMS, cdiv

__all__ = ["BOTH", "FEW", "MANY", "TRANSPOSED", "Tile", "block_tile", "tile_for"]


@dataclass(frozen=True)
class Tile:
    """Rows and columns of one program, and its warps."""

    rows: int
    columns: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"ROWS": self.rows, "COLUMNS": self.columns}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps}

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the programs for a matrix."""
        return cdiv(rows, self.rows), cdiv(columns, self.columns)


MANY = Tile(rows=8, columns=1024, num_warps=8)  # at most 64 registers: 4 programs; 16-byte loads, 4 of them in flight
FEW = Tile(rows=1, columns=GROUP, num_warps=1)  # a decode step: as many programs as there are groups
TRANSPOSED = Tile(rows=GROUP, columns=64, num_warps=4)  # at most 128 registers: 4 programs
BOTH = Tile(rows=GROUP, columns=GROUP, num_warps=4)  # 8 warps need fewer registers but fit once only, instead of twice


def tile_for(rows: int, columns: int) -> Tile:
    """Returns the tile for values that are quantized along the rows."""
    across, down = MANY.grid(rows, columns)
    return MANY if across * down >= ENOUGH_PROGRAMS else FEW


def block_tile(rows: int, columns: int, values: int) -> Tile:
    """Returns a tile of one block of a weight, with so many values a thread."""
    return Tile(rows, columns, max(1, rows * columns // (32 * values)))
