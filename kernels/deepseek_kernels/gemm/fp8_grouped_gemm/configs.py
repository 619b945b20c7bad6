"""Tiles of the grouped FP8 products: static rules on shapes, which need neither Triton nor a GPU.

Only the device knows the rows of each expert; the rules go by their mean. As in `fp8_gemm`,
the thresholds are estimates, not measurements.
"""

from __future__ import annotations

from ...common.fp8 import GROUP
from ...common.host import cdiv
from ..fp8_gemm.configs import PLAIN, PLAIN_ROWS, SPECIALIZED, Config, few_config

__all__ = ["gradient_config", "product_config"]

# Rows of an expert from which on the larger tile pays: its last tile is half empty, in the mean.
_LONG = 256
# Groups of tokens from which on copying ahead pays; below, a tile is mostly the writing of its result.
_DEEP = 4


def product_config(rows: int, experts: int, column_tiles: int, hopper: bool, processors: int) -> Config:
    """Returns the tile of `x[rows] @ weight[expert].T`.

    Args:
        rows: of x, of all experts together.
        column_tiles: tiles of 128 of an expert's weight.
        hopper: whether the device can run a specialized configuration.
        processors: multiprocessors of the device.
    """
    each = cdiv(rows, experts)
    # A decode step: few rows for each of many experts. Bound by the bytes of the experts in use.
    few = few_config(each)
    if few is not None:
        return few
    tiles = cdiv(rows, SPECIALIZED.rows) * column_tiles
    return SPECIALIZED if hopper and each >= _LONG and tiles >= processors else PLAIN


def gradient_config(columns: int, experts: int, hopper: bool) -> Config:
    """Returns the tile of the weights' gradient, a sum over each expert's part of so many columns."""
    return SPECIALIZED if hopper and columns >= _DEEP * GROUP * experts else PLAIN_ROWS
