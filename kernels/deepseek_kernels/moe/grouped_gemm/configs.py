"""Tiles of the grouped products: static rules on shapes, which need neither Triton nor a GPU.

The compile gate shows registers, spills and shared memory of every configuration here. The thresholds are estimates
from arithmetic, not measurements: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.host import cdiv

__all__ = [
    "FEW",
    "GROUP",
    "MEDIUM",
    "PLAIN",
    "SQUARE",
    "UNALIGNED",
    "WIDE",
    "Config",
    "gradient_config",
    "product_config",
    "rows_aligned",
]


@dataclass(frozen=True)
class Config:
    """One tile of a result, `rows` by `columns`, made in steps of `depth`.

    Attributes:
        specialized: operands come by descriptors and the bulk copy engine, and one warp group copies while two
            multiply. Hopper only, and only for operands that are `rows_aligned`.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    specialized: bool = False

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """The kernels' constant TILE."""
        return self.rows, self.columns, self.depth, GROUP

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a launch on this machine."""
        stages = self.stages(hip=torch.version.hip is not None)
        return {"TILE": self.tile, "num_warps": self.num_warps, "num_stages": stages}

    def stages(self, hip: bool) -> int:
        """Returns the pipeline's depth: AMD GPUs have one step in their 64 KB of shared memory, one in registers."""
        return min(self.num_stages, 2) if hip else self.num_stages


# Row tiles that share a weight while it is in the L2 cache: 8 of 128 rows are 15 MB at 7168 columns, of 50 MB.
GROUP = 8

# A step of 128 x 256 x 64 reads 48 KB for 1024 cycles of products, just what the L2 cache of an H100 delivers to each
# multiprocessor (about 47 bytes a cycle, by the cost model of DeepGEMM); 128 x 128 would need 64.
WIDE = Config(128, 256, 64, num_warps=4, num_stages=4, specialized=True)
SQUARE = Config(128, 128, 64, num_warps=4, num_stages=4, specialized=True)  # where WIDE would leave processors idle
PLAIN = Config(128, 128, 64, num_warps=8, num_stages=3)  # any GPU; two programs a multiprocessor
MEDIUM = Config(64, 128, 64, num_warps=4, num_stages=4)
# Decoding: bound by the bytes of the experts in use. 16 KB a stage, 3 stages in flight, 3 programs a multiprocessor.
FEW = Config(16, 64, 128, num_warps=4, num_stages=4)
# Numbers come one by one, each by a pointer of its own: larger tiles spill.
UNALIGNED = Config(64, 64, 32, num_warps=4, num_stages=2)

_PROCESSORS = 132  # of an H100 or H200
# From here on an expert has enough rows to hide the start and the end of a program that has its multiprocessor alone.
_LONG = 1024


def rows_aligned(*operands: Tensor) -> bool:
    """Tells if all rows of these half-precision matrices begin at multiples of 16 bytes, as bulk copies need.

    Rows of float32 never are: the tiles are made for 16 bits, and four-byte numbers would not fit.
    """
    return all(
        x.element_size() == 2
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and (x.data_ptr() | 2 * x.stride(0)) % 16 == 0
        for x in operands
    )


def product_config(rows: int, experts: int, columns: int, aligned: bool, specialized: bool) -> Config:
    """Returns the tile of `x[rows] @ weight[expert].T` for P rows, E experts and a result of so many columns.

    Args:
        aligned: whether the operands are `rows_aligned`.
        specialized: whether the device, and all but the alignment, allow a specialized configuration.
    """
    if not aligned:
        return UNALIGNED
    each = rows / max(experts, 1)
    if each <= FEW.rows:
        return FEW
    if each <= MEDIUM.rows:
        return MEDIUM
    if not specialized:
        return PLAIN
    tiles = cdiv(rows, WIDE.rows) * cdiv(columns, WIDE.columns)
    return WIDE if tiles >= _PROCESSORS else SQUARE


def gradient_config(rows: int, experts: int, half: bool, specialized: bool) -> Config:
    """Returns the tile of the weights' gradient, a sum over the rows of each expert.

    Args:
        half: whether the operands have 16 bits; float32 takes the smallest tile.
        specialized: whether the device and the operands allow a specialized configuration.
    """
    if not half:
        return UNALIGNED
    return WIDE if specialized and rows >= _LONG * experts else PLAIN
