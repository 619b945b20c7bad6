"""FP8 values (float8_e4m3fn) with a float32 scale for each group: constants, shapes of scales, layouts, decoding.

`quant/fp8_quantize` has the rules by which values and scales are made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .host import cdiv

__all__ = [
    "ACTIVATION_FLOOR",
    "FP8_MAX",
    "GROUP",
    "HIGH_PRECISION",
    "WEIGHT_FLOOR",
    "block_grid",
    "decode",
    "empty_codes",
    "empty_scales",
]

GROUP = 128  # features of an activation, or rows and columns of a weight, that share a scale
FP8_MAX = 448.0  # largest finite float8_e4m3fn
HIGH_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
# The least absolute maximum that a scale is made of: DeepSeek's for activations, the least normal scale for weights.
ACTIVATION_FLOOR = 1e-4
WEIGHT_FLOOR = FP8_MAX * torch.finfo(torch.float32).tiny


def block_grid(shape: torch.Size | tuple[int, ...], block_size: tuple[int, int], parts: int = 1) -> tuple[int, ...]:
    """Returns the shape of the scales of a [(E,) R, C] weight whose rows are `parts` stacked matrices.

    Blocks at the lower and right edge of each matrix may be partial.
    """
    (*experts, rows, columns), (block_rows, block_columns) = shape, block_size
    return (*experts, parts * cdiv(rows // parts, block_rows), cdiv(columns, block_columns))


def empty_codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns [rows, columns] float8_e4m3fn, each row at a multiple of 16 bytes, as Hopper's copy engine needs it."""
    return torch.empty(rows, cdiv(columns, 16) * 16, dtype=torch.float8_e4m3fn, device=device)[:, :columns]


def empty_scales(rows: int, groups: int, device: torch.device) -> Tensor:
    """Returns [rows, groups] float32, stored column by column, each column at a multiple of 16 bytes."""
    return torch.empty(groups, cdiv(rows, 4) * 4, dtype=torch.float32, device=device)[:, :rows].T


def decode(codes: Tensor) -> Tensor:
    """Converts float8_e4m3fn to float32, exactly, several times faster on a CPU than torch's own conversion.

    The bits s eeee mmm, put at the same places of a float16 (s 0eeee mmm0000000), are the same number but for the
    exponent bias, 15 instead of 7: a factor 2^8. Subnormals follow the same rule. NaN, all ones, is the one value where
    adding a unit to the last place reaches the free bit of the exponent; set there, it makes a NaN of the float16.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    bits |= (bits + (1 << 7)).bitwise_and_(1 << 14)
    return bits.view(torch.float16).float().mul_(256.0)
