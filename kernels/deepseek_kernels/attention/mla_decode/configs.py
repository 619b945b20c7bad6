"""Tiles of the absorbed attention, and the number of its parts: static rules on shapes, without Triton or a GPU.

The compile gate shows registers, spills and shared memory of every configuration here. 128 heads and 16 have different
ones: with 128, each byte of the cache is used for 242 floating-point operations, so that products bound the time; with
16 it is 30, and reading the cache does. Nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...common.host import cdiv

__all__ = [
    "BLACKWELL",
    "FEW",
    "FEW_PACKED",
    "MANY",
    "MOST_LATENT",
    "MOST_ROTATED",
    "SMALL",
    "SUM_COLUMNS",
    "SUM_ROWS",
    "SUM_STEP",
    "WIDE",
    "Config",
    "config_for",
    "splits_for",
]

# The tiles of the kernels are made for these: more would not fit into shared memory.
MOST_LATENT, MOST_ROTATED = 512, 64


@dataclass(frozen=True)
class Config:
    """Tile of ROWS pairs of a query and a head, against KEYS keys at a time.

    Attributes:
        bulk: keys and results go through the copy engine where they can.
        hoist: whether addresses are computed once and kept.
        maxnreg: registers of a thread at most.
        resident: programs that fit on one multiprocessor, by shared memory.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    bulk: bool = False
    hoist: bool = False
    maxnreg: int | None = None
    resident: int = 1

    @property
    def blocks(self) -> dict[str, int | bool]:
        """The kernel's constants."""
        return {"ROWS": self.rows, "KEYS": self.keys, "HOIST": self.hoist, "STAGES": self.num_stages}

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# Two warpgroups share the 512 columns of the result and the 64 keys of the scores: 64 rows fill a product of Hopper's.
MANY = Config(64, 64, num_warps=8, num_stages=2, bulk=True)
# Its compiler takes twice as much shared memory for 64 keys.
BLACKWELL = Config(64, 32, num_warps=8, num_stages=2)
# Up to 16 heads. Never 32 rows: too many for these products and too few for Hopper's. Two programs share a
# multiprocessor, if neither has more than 128 registers: one computes while the other waits for its keys.
FEW = Config(16, 64, num_warps=8, num_stages=2, hoist=True, maxnreg=128, resident=2)
FEW_PACKED = Config(16, 32, num_warps=4, num_stages=2, resident=2)  # dequantized keys take room too
# GPUs with little shared memory: 64 KB on AMD's, 99 KB on NVIDIA's smaller ones.
SMALL = Config(16, 16, num_warps=4, num_stages=1)
# float32, whose products are not made by matrix units; for tests on small models.
WIDE = Config(16, 16, num_warps=4, num_stages=1)

# A program's own cost, in tiles: queries, descriptors, the first tile's latency, the result.
_START = 4
_LEAST = 256  # keys of a part
_MOST = 128  # parts

# The sum of parts: rows, columns and parts of a program at a time.
SUM_ROWS, SUM_COLUMNS, SUM_STEP = 4, 128, 8


def config_for(rows: int, dtype: torch.dtype, packed: bool, capability: tuple[int, int] | None) -> Config:
    """Returns the tile for the T * N rows of a row of the batch.

    Args:
        packed: whether keys are bytes.
        capability: of a CUDA device; None for an AMD one.
    """
    if dtype == torch.float32:
        return WIDE
    if capability is None or (capability != (8, 0) and capability[0] not in (9, 10)):
        return SMALL
    if rows <= FEW.rows or capability[0] == 8:
        return FEW_PACKED if packed else FEW
    return MANY if capability[0] == 9 else BLACKWELL


def splits_for(batch: int, blocks: int, keys: int, config: Config, processors: int) -> int:
    """Returns the number of parts to cut the keys into: the fewest that keep all processors busy for the shortest time.

    By the longest row alone: only the device knows the others' lengths, and nothing here may wait for it.
    """
    tiles, slots = cdiv(keys, config.keys), processors * config.resident

    def cost(splits: int) -> int:
        return cdiv(batch * blocks * splits, slots) * (cdiv(tiles, splits) + _START)

    return min(range(1, max(1, min(_MOST, cdiv(keys, _LEAST))) + 1), key=cost)
