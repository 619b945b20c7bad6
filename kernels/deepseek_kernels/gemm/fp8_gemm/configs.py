"""Tiles of the FP8 product: static rules on shapes, which need neither Triton nor a GPU.

The compile gate shows registers, spills and shared memory of every configuration here. The thresholds are estimates
from arithmetic, not measurements: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...common.fp8 import GROUP
from ...common.host import cdiv

__all__ = [
    "BAND",
    "FEW",
    "PLAIN",
    "PLAIN_ROWS",
    "SPECIALIZED",
    "SPLITS",
    "SUM_BLOCK",
    "Config",
    "few_config",
    "product_config",
]


@dataclass(frozen=True)
class Config:
    """One tile of the result, made in steps of 128, the groups that share a scale.

    Args:
        rows: of the left operand's tile.
        columns: rows of the right operand's tile.
        specialized: operands come by the bulk copy engine, and one warp group copies while two multiply. Hopper only.
        swapped: the left operand is the weight, so that few tokens fill the narrow side of a tensor core's product.
        max_registers: for each thread, where the compiler would take more than lets another program in.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    specialized: bool = False
    swapped: bool = False
    max_registers: int | None = None

    @property
    def tile(self) -> tuple[int, int]:
        """The kernels' constant TILE."""
        return self.rows, self.columns

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of all kernels; the plain ones have their stages written at the loop too."""
        return {"TILE": self.tile, "BAND": BAND, **({} if self.specialized else {"STAGES": self.num_stages})}

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})

    def tiles(self, rows: int, columns: int) -> int:
        """Returns the number of tiles of a result."""
        return cdiv(rows, self.rows) * cdiv(columns, self.columns)


# Row tiles that share their columns while both are in the L2 cache: 8 of 128 rows are 7 MB at 7168 columns, of 50 MB.
BAND = 8

# Two consumers of 64 x 128: the accumulator, and the product that is promoted into it, fit their registers only so.
# One stage more would fit too, but then not the float32 result that is stored through shared memory beside it.
SPECIALIZED = Config(128, 128, num_warps=4, num_stages=4, specialized=True)
# Any GPU. While one program promotes, the others multiply: 3 fit a multiprocessor of an H100, by registers and by
# shared memory. A scale for each column takes the registers of the third.
PLAIN = Config(64, 128, num_warps=4, num_stages=3, max_registers=168)
PLAIN_ROWS = Config(64, 128, num_warps=4, num_stages=3)
# A decode step reads the weight once, and that is its time. 18 to 24 KB a stage, 3 stages in flight, 2 or 3 programs a
# multiprocessor: several times the 32 KB that hide a microsecond of latency at 4.3 TB/s.
FEW = tuple(Config(128, tokens, num_warps=4, num_stages=4, swapped=True) for tokens in (16, 32, 64))

SPLITS = (1, 2, 4, 8, 16)  # parts of the sum that programs of their own compute
SUM_BLOCK = 512  # numbers of the result for which one program adds the parts
# Of the last round of tiles: with fewer processors at work, smaller tiles that need no rounds are faster.
_LEAST_EFFICIENCY = 0.75


def few_config(tokens: int) -> Config | None:
    """Returns the tile for at most 64 tokens, None for more."""
    return next((config for config in FEW if tokens <= config.columns), None)


def product_config(
    rows: int, columns: int, depth: int, by_rows: bool, hopper: bool, processors: int
) -> tuple[Config, int]:
    """Returns the tile of `a @ b.T` for a [M, K] and b [N, K], and the number of parts that its sum over K is split
    into.

    Args:
        by_rows: whether b has scales for each row rather than for blocks.
        hopper: whether the device can run a specialized configuration.
        processors: multiprocessors of the device.
    """
    few = None if by_rows else few_config(rows)
    if few is not None:
        # Twice the processors: the last, incomplete round then costs less.
        return few, _splits(cdiv(columns, few.rows), 2 * processors, depth)
    tiles = SPECIALIZED.tiles(rows, columns)
    if hopper and tiles >= _LEAST_EFFICIENCY * cdiv(tiles, processors) * processors:
        return SPECIALIZED, 1
    plain = PLAIN_ROWS if by_rows else PLAIN
    return plain, _splits(plain.tiles(rows, columns), processors, depth)


def _splits(tiles: int, programs: int, depth: int) -> int:
    """Returns the fewest splits that give so many programs, of two groups at least each."""
    possible = [splits for splits in SPLITS if splits == 1 or 2 * splits * GROUP <= depth]
    return next((splits for splits in possible if tiles * splits >= programs), possible[-1])
