"""Operands of FP8 operators, their bytes and tolerances, and torch's own block-scaled product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import quantize_blocks, quantize_rows, quantize_transposed, use_backend
from deepseek_kernels.common.fp8 import GROUP, decode

from .operands import Random

__all__ = [
    "BF16_ROUNDING",
    "CODES_OFF",
    "PRODUCT_ERROR",
    "activations",
    "block_bytes",
    "ceil_div",
    "group_bytes",
    "product_tolerance",
    "scaled_mm",
    "tensorwise_mm",
    "transposed_activations",
    "weights",
    "wide",
]

# Relative errors that make up the tolerance of a product. A bfloat16 result differs from the exact one by half a unit
# of its 8 bits.
BF16_ROUNDING = 2.0**-9
# The FP8 units keep 14 bits of a sum. Four products of 32 terms each are added before they are promoted to float32:
# they lose 4 * 2^-13 at most, 4.9e-4. This is twice that.
PRODUCT_ERROR = 1e-3
# Quantized values whose float32 inputs differ in the last bits: about one code in 2^18 falls on the other side of a
# tie and moves by at most an eighth, 2^-3 * 2^-9 in the norm. This is four times that.
CODES_OFF = 1e-3


def product_tolerance(dtype: torch.dtype) -> float:
    """Returns the tolerance of an FP8 product rounded to `dtype`."""
    return PRODUCT_ERROR + (BF16_ROUNDING if dtype != torch.float32 else 0.0)


def ceil_div(a: int, b: int = GROUP) -> int:
    return -(-a // b)


# ------------------------------------------------------------------ operands, quantized by the references


def activations(random: Random, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns codes [rows, columns] and scales of normal activations, in groups of columns."""
    with use_backend("reference"):
        return quantize_rows(random.normal(rows, columns))


def transposed_activations(random: Random, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns codes [columns, rows] and scales of normal activations, in groups of rows."""
    with use_backend("reference"):
        return quantize_transposed(random.normal(rows, columns))


def weights(random: Random, *shape: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of normal weights: [N, K], or [E, N, K] whose N rows are `parts` matrices."""
    *experts, rows, columns = shape
    count = experts[0] if experts else 1
    with use_backend("reference"):
        pairs = [quantize_blocks(random.normal(rows // parts, columns)) for _ in range(count * parts)]
    codes = torch.stack([one for one, _ in pairs]).view(count, rows, columns)
    scale = torch.stack([one for _, one in pairs]).flatten(0, 1).view(count, -1, ceil_div(columns))
    return (codes, scale) if experts else (codes[0], scale[0])


def wide(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns codes [M, K] times their scales, of rows or of blocks."""
    if scale.shape[0] != codes.shape[0]:
        scale = scale.repeat_interleave(GROUP, 0)[: codes.shape[0]]
    return decode(codes).mul_(scale.repeat_interleave(GROUP, 1)[:, : codes.shape[1]]).to(dtype)


# ------------------------------------------------------------------ bytes


def group_bytes(rows: int, columns: int) -> int:
    """Returns the bytes of codes and their scales in groups of 128 along each row."""
    return rows * columns + 4 * rows * ceil_div(columns)


def block_bytes(rows: int, columns: int) -> int:
    """Returns the bytes of codes and their scales in blocks of 128 by 128."""
    return rows * columns + 4 * ceil_div(rows) * ceil_div(columns)


# ------------------------------------------------------------------ torch's own products


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiplies with cuBLAS's block-scaled product, on Hopper only; the arguments are those of `fp8_gemm`.

    It requires contiguous columns of row scales, and scales of blocks in columns of a multiple of 4.

    Raises:
        RuntimeError, ValueError, AttributeError: this torch, CUDA or device has none, or not for these sizes.
    """
    one_by_128 = F.ScalingType.BlockWise1x128
    if b_scale.shape[0] == b.shape[0]:
        recipe, b_scale = one_by_128, _dense_columns(b_scale)
    else:
        recipe, b_scale = F.ScalingType.BlockWise128x128, F.pad(b_scale, (0, -b_scale.shape[1] % 4)).T
    return F.scaled_mm(a, b.T, _dense_columns(a_scale), one_by_128, b_scale, recipe, output_dtype=dtype)


def _dense_columns(scale: Tensor) -> Tensor:
    return scale if scale.stride() == (1, scale.shape[0]) else scale.T.contiguous().T


def tensorwise_mm(a: Tensor, b: Tensor, one: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies the codes with one scale for all: another result, and the speed of the FP8 units without promotion."""
    return torch._scaled_mm(a, b.T, one, one, out_dtype=dtype, use_fast_accum=True)
