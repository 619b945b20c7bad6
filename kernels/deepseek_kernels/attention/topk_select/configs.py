"""Sizes of the selection's programs: static rules on shapes, which need neither Triton nor a GPU.

The compile gate shows registers of every size. Nothing here was measured.
"""

from __future__ import annotations

from ...common.host import cdiv, power_of_two

__all__ = ["LEAST", "MOST", "MOST_CHOSEN", "SCRATCH_BYTES", "block_for", "rows_for", "warps_for"]

MOST = 8192  # keys of a row that a program holds in registers, 16 of them a thread
LEAST = 1024  # keys of the smallest tile that is worth a choice of its own
# Each program of a longer row keeps at most half of its keys, so that what is left becomes shorter.
MOST_CHOSEN = MOST // 2
SCRATCH_BYTES = 64 << 20  # of scores and indices between programs of long rows


def block_for(keys: int) -> int:
    """Returns the places of a program for so many keys."""
    return max(16, power_of_two(keys))


def warps_for(block: int) -> int:
    """Returns the warps of a program."""
    return max(1, min(16, block // 512))


def rows_for(keys: int, top_k: int) -> int:
    """Returns the rows of a launch, so that what programs leave for the next launch is bounded."""
    return max(1, SCRATCH_BYTES // (8 * cdiv(keys, MOST) * top_k))
