"""`fp8_quantize`: tensors to FP8 values (e4m3) with a scale for each group of 128, and back.

Activations have one scale for 128 consecutive features of a token, weights one for a block of 128 by 128. A gradient
with respect to a weight sums over tokens, so its operands need groups of 128 *tokens*: they are quantized again from
the high-precision values, transposed, because transposed FP8 values would have the wrong scales (TRAPS E9).

One rule for every operator here and both of its implementations, so that they agree bit by bit:

- The scale is `max(amax, floor) / 448` in float32, and a number is FP8 value * scale. The floor keeps a group of zeros
  away from a division by zero (TRAPS E4): 1e-4 for activations, as in DeepSeek's inference code, and for weights, which
  may be tiny, the least that keeps the scale a normal number.
- With `scale_format="ue8m0"` the scale is rounded up to a power of two *before* the division (TRAPS E5).
- The FP8 value is `number / scale`, rounded as IEEE 754 divides, then to the nearest e4m3, ties to even.
- A NaN stays NaN and does not change its group's scale. e4m3 has no infinity: one in a group makes the scale infinite
  and every value of the group NaN, so that an overflow cannot be taken for a large number.

The results carry no gradient: training code chooses the derivative that it needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.fp8 import FP8_MAX, GROUP, HIGH_PRECISION, block_grid
from . import reference
from .reference import quantize_rows as quantize_rows_reference

__all__ = [
    "FP8_MAX",
    "GROUP",
    "HIGH_PRECISION",
    "dequantize_blocks",
    "quantize_blocks",
    "quantize_both",
    "quantize_grouped_transposed",
    "quantize_rows",
    "quantize_rows_reference",
    "quantize_transposed",
]

# 8.9: the first with conversions between float32 and e4m3.
dispatch.register("fp8_quantize", "triton", capability=(8, 9))


def quantize_rows(x: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes activations, in groups of 128 along each token.

    Args:
        x: [M, K], float32, bfloat16 or float16; K of any size, the last group partial.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        values [M, K] float8_e4m3fn, each row at a multiple of 16 bytes, and scales [M, ceil(K / 128)] float32, stored
        column by column (stride 1 along M, columns at multiples of 16 bytes): the order in which a product reads them.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    return implementation.quantize_rows(x.detach(), power_of_two)


def quantize_transposed(x: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes the transposed activations, in groups of 128 tokens: equal to `quantize_rows(x.T)`.

    Args:
        x: [M, K], as for `quantize_rows`; M of any size.

    Returns:
        values [K, M] and scales [K, ceil(M / 128)], laid out as those of `quantize_rows`.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    return implementation.quantize_transposed(x.detach(), power_of_two)


def quantize_both(x: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes as `quantize_rows` and as `quantize_transposed` in one reading of `x`, for the three products of
    training.

    Returns:
        The values and scales of `quantize_rows`, then those of `quantize_transposed`.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    return implementation.quantize_both(x.detach(), power_of_two)


def quantize_grouped_transposed(x: Tensor, ends: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes each expert's rows as `quantize_transposed`: no group of tokens spans two experts.

    Args:
        x: [P, K], rows sorted by expert.
        ends: [E] int64, nondecreasing; expert e owns rows `ends[e - 1]` to `ends[e] - 1`, rows from `ends[-1]` on
            are unassigned.

    Returns:
        values [K, P'] and scales [K, P' / 128], laid out as those of `quantize_rows`. Each expert's tokens start at a
        multiple of 128, after those of the experts before it; columns that hold no token are 0. P' is the most
        that P rows and E experts can need, ceil((P + 127 * min(E, P)) / 128) * 128, so that it does not depend on the
        data, and the kernel leaves `ends` on the device.

    Raises:
        ValueError: a wrong shape, dtype or scale format. That `ends` ascend to P at most is not checked.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    if ends.ndim != 1 or ends.dtype != torch.int64:
        raise ValueError(f"expected int64 ends [E], got {ends.dtype} {list(ends.shape)}")
    return implementation.quantize_grouped_transposed(x.detach(), ends, power_of_two)


def quantize_blocks(
    weight: Tensor,
    block_size: tuple[int, int] = (GROUP, GROUP),
    scale_format: str | None = None,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """Quantizes a weight, one scale for each block, as the published checkpoints store it.

    Args:
        weight: [R, C] or [E, R, C], float32, bfloat16 or float16; blocks at the lower and right edge may be partial.
        block_size: rows and columns of a block. The Triton kernel takes powers of two up to 128.
        scale_format: None for float32 scales, "ue8m0" for powers of two.
        parts: number of equal matrices that are stacked in the R rows, each with a grid of blocks of its own (2 for
            gate above up).

    Returns:
        values of the weight's shape, float8_e4m3fn, and scales [(E,) parts * ceil(R / parts / block_rows),
        ceil(C / block_columns)] float32, both contiguous. The reference's extra memory is one row of blocks.

    Raises:
        ValueError: a wrong shape, dtype, block size or scale format, or parts that do not divide R.
    """
    implementation, power_of_two = _prepare(weight, scale_format, block_size, stacked=True)
    _check_parts(weight.shape, parts)
    return implementation.quantize_blocks(weight.detach(), *block_size, power_of_two, parts)


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_size: tuple[int, int] = (GROUP, GROUP),
    dtype: torch.dtype = torch.bfloat16,
    parts: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantizes a weight: `float32(code) * scale`, rounded once to `dtype`.

    Args:
        codes: FP8 values, [R, C] or [E, R, C] float8_e4m3fn.
        scale: [(E,) parts * ceil(R / parts / block_rows), ceil(C / block_columns)] float32, of any layout. Blocks of 1
            by 128 read activations back.
        dtype: float32, bfloat16 or float16.
        parts: number of stacked matrices in the rows, each with a grid of its own.
        out: a tensor of the codes' shape, of any layout, to write into; its dtype replaces `dtype`.

    Returns:
        `out`, or a new contiguous tensor. The reference's extra memory is one row of blocks.

    Raises:
        ValueError: a wrong shape, dtype or block size, or parts that do not divide R.
    """
    if codes.ndim not in (2, 3) or codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"expected float8_e4m3fn codes [R, C] or [E, R, C], got {codes.dtype} {list(codes.shape)}")
    if out is None:
        out = torch.empty(codes.shape, dtype=_check_dtype(dtype), device=codes.device)
    elif out.shape != codes.shape or out.dtype not in HIGH_PRECISION:
        raise ValueError(
            f"expected out {list(codes.shape)} in float32, bfloat16 or float16, got {out.dtype} {list(out.shape)}"
        )
    obstacle = _check_blocks(block_size)
    _check_parts(codes.shape, parts)
    grid = block_grid(codes.shape, block_size, parts)
    if tuple(scale.shape) != grid or scale.dtype != torch.float32:
        raise ValueError(
            f"expected float32 scales {list(grid)} for {list(codes.shape)} codes in blocks of {list(block_size)}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    implementation = _implementation(codes.device, obstacle)
    implementation.dequantize_into(out.detach(), codes, scale.detach(), *block_size, parts)
    return out


def _prepare(x: Tensor, scale_format: str | None, block_size: tuple[int, int] = (GROUP, GROUP), stacked: bool = False):
    """Checks the arguments of a quantization; returns the module that runs it, and if scales are powers of two."""
    if not (x.ndim == 2 or (stacked and x.ndim == 3)) or x.dtype not in HIGH_PRECISION:
        kind = "matrix or stack of matrices" if stacked else "matrix"
        raise ValueError(f"expected a float32, bfloat16 or float16 {kind}, got {x.dtype} {list(x.shape)}")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    return _implementation(x.device, _check_blocks(block_size)), scale_format == "ue8m0"


def _check_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in HIGH_PRECISION:
        raise ValueError(f"expected dtype float32, bfloat16 or float16, got {dtype}")
    return dtype


def _check_parts(shape: torch.Size, parts: int) -> None:
    if parts < 1 or shape[-2] % parts:
        raise ValueError(f"expected a number of parts that divides {shape[-2]} rows, got {parts}")


def _check_blocks(block_size: tuple[int, int]) -> str | None:
    """Raises for an impossible block size; returns why the Triton kernel cannot take it, or None."""
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"expected two positive block sizes, got {block_size}")
    if all(size in (1, 2, 4, 8, 16, 32, 64, 128) for size in block_size):
        return None
    return f"its blocks are powers of two up to 128, got {list(block_size)}"


def _implementation(device: torch.device, unsupported: str | None):
    if dispatch.pick("fp8_quantize", device, unsupported) == "reference":
        return reference
    from . import launch

    return launch
