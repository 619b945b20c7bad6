"""Tiles of `latent_write`: static rules on shapes, which need neither Triton nor a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...common.fp8 import GROUP
from ...common.host import ENOUGH_PROGRAMS, cdiv, power_of_two
from ...norm.rms_norm.configs import OPTIONS

__all__ = ["Tile", "tile_for"]


@dataclass(frozen=True)
class Tile:
    """Tokens of a program, the powers of two that a latent and half a key fit into, and the warps."""

    rows: int
    columns: int
    pairs: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "PAIRS": self.pairs}

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options: those of `rms_norm`, whose sums must be the same."""
        return {"num_warps": self.num_warps, **OPTIONS}


def tile_for(tokens: int, latent: int, rotated: int) -> Tile:
    """Returns a tile of 16 values of latents a thread; few tokens get a program each."""
    columns, pairs = max(GROUP, power_of_two(latent)), power_of_two(max(1, rotated // 2))
    rows = max(1, 2048 // columns)
    if cdiv(tokens, rows) < ENOUGH_PROGRAMS:
        rows = 1
    return Tile(rows, columns, pairs, max(1, rows * columns // 512))
