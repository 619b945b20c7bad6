"""Tiles of the first product: static rules on shapes, as in `grouped_gemm`, which has those of the second.

`columns` counts columns of the result: each needs a row of the gate and one of the up matrix, and two sums. The compile
gate shows the cost of a configuration; the thresholds are estimates from arithmetic, not measurements.
"""

from __future__ import annotations

from ..grouped_gemm.configs import Config

__all__ = ["FEW", "MANY", "MEDIUM", "SUM_COLUMNS", "UNALIGNED", "WIDE", "swiglu_config"]

SUM_COLUMNS = 1024  # of a row of the weighted sum, by 128 threads: 16 bytes of bfloat16 each

# 128 x (128 + 128) x 64 reads 48 KB for 1024 cycles of products, as `grouped_gemm`'s WIDE.
WIDE = Config(128, 128, 64, num_warps=4, num_stages=4, specialized=True)  # Hopper, rows in their places
MANY = Config(128, 128, 64, num_warps=8, num_stages=4)  # rows gathered by asynchronous copies, 16 bytes each
MEDIUM = Config(64, 64, 64, num_warps=4, num_stages=4)
# Decoding: bound by the bytes of the experts in use. 16 KB of weights a stage, as in `grouped_gemm`.
FEW = Config(16, 32, 128, num_warps=4, num_stages=4)
# Numbers come one by one, each by a pointer of its own; float32 too.
UNALIGNED = Config(64, 32, 32, num_warps=4, num_stages=2)


def swiglu_config(rows: int, experts: int, aligned: bool, gathered: bool, generation: int) -> Config:
    """Returns the tile of `silu(x[rows] @ gate[expert].T) * (x[rows] @ up[expert].T)` for P rows and E experts.

    Args:
        rows: unassigned ones included, whose number only the device knows.
        aligned: whether the operands are `rows_aligned`.
        gathered: whether the rows of x are read through an index, and not from their places.
        generation: the first number of the CUDA compute capability; 0 for other devices.
    """
    if not aligned:
        return UNALIGNED
    each = rows / max(experts, 1)
    if each <= FEW.rows:
        return FEW
    # 8: operands pass through registers, which MANY's sums fill; 12: too little shared memory for it.
    if each <= MEDIUM.rows or generation in (8, 12):
        return MEDIUM
    return WIDE if generation == 9 and not gathered else MANY
