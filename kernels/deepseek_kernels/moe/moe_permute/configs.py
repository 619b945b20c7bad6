"""Sizes of the programs that sort and move rows."""

from __future__ import annotations

__all__ = ["BYTE_COLUMNS", "COLUMNS", "OPTIONS", "STEP", "STEPS", "table_rows"]

STEP = 64  # pairs ranked against each other at a time
STEPS = 16
COLUMNS = 1024  # of a row, by 128 threads: 16 bytes of bfloat16 each
BYTE_COLUMNS = 2048
# No fusion of products into sums: the reference has none, and these kernels wait for memory.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def table_rows(bins: int) -> int:
    """Returns the rows of the table of counts that are read at a time: 32 numbers a thread."""
    return max(1, 4096 // bins)
