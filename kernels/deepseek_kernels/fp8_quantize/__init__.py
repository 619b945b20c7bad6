"""`fp8_quantize`: tensors to e4m3 codes with a scale for each group of 128, and back.

Activations have one scale for 128 consecutive features of a token, weights one for a block of 128 by 128. A gradient
with respect to a weight sums over tokens, so its operands need groups of 128 *tokens*: they are quantized again from
the high-precision values, transposed, because transposed codes would carry the wrong scales (TRAPS E9).

One rule for every operator here and both of its implementations, so that they agree bit by bit:

- The scale is `max(amax, floor) / 448` in float32, and value = code * scale. The floor keeps a group of zeros away from
  a division by zero (TRAPS E4): 1e-4 for activations, as in DeepSeek's inference code, and for weights, which may be
  tiny, the least that keeps the scale a normal number.
- With `scale_format="ue8m0"` the scale is rounded up to a power of two *before* the division (TRAPS E5).
- The code is `value / scale`, rounded as IEEE 754 divides, then to the nearest e4m3, ties to even.
- A NaN becomes a NaN code and leaves its group's scale alone. e4m3 has no infinity: one in a group makes the scale
  infinite and every code of the group NaN, so that an overflow cannot pass for a large number.

The results carry no gradient: whoever trains through them chooses what their derivative is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import reference
from .reference import FP8_MAX, GROUP

__all__ = [
    "FP8_MAX",
    "GROUP",
    "dequantize_blocks",
    "quantize_blocks",
    "quantize_both",
    "quantize_rows",
    "quantize_transposed",
]

# 8.9: the first with conversions between float32 and e4m3.
dispatch.register("fp8_quantize", "triton", capability=(8, 9))


def quantize_rows(x: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations, in groups of 128 along each token.

    Args:
        x: [M, K], float32, bfloat16 or float16; K of any size, the last group partial.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        codes [M, K] float8_e4m3fn, each row at a multiple of 16 bytes, and scales [M, ceil(K / 128)] float32, stored
        column by column (stride 1 along M, columns at multiples of 16 bytes): the order in which a product reads them.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    return implementation.quantize_rows(x.detach(), power_of_two)


def quantize_transposed(x: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of the transposed activations, in groups of 128 tokens: equal to `quantize_rows(x.T)`.

    Args:
        x: [M, K], as for `quantize_rows`; M of any size.

    Returns:
        codes [K, M] and scales [K, ceil(M / 128)], laid out as those of `quantize_rows`.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    return implementation.quantize_transposed(x.detach(), power_of_two)


def quantize_both(x: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` and `quantize_transposed` in one reading of `x`: what training needs for its three products.

    Returns:
        The codes and scales of `quantize_rows`, then those of `quantize_transposed`.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    implementation, power_of_two = _prepare(x, scale_format)
    return implementation.quantize_both(x.detach(), power_of_two)


def quantize_blocks(
    weight: Tensor, block_size: tuple[int, int] = (GROUP, GROUP), scale_format: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, one scale for each block, as the published checkpoints store them.

    Args:
        weight: [R, C], float32, bfloat16 or float16; blocks at the lower and right edge may be partial.
        block_size: rows and columns of a block. The Triton kernel takes powers of two up to 128.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        codes [R, C] float8_e4m3fn and scales [ceil(R / block_rows), ceil(C / block_columns)] float32, both contiguous.

    Raises:
        ValueError: a wrong shape, dtype, block size or scale format.
    """
    implementation, power_of_two = _prepare(weight, scale_format, block_size)
    return implementation.quantize_blocks(weight.detach(), *block_size, power_of_two)


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_size: tuple[int, int] = (GROUP, GROUP),
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The matrix that codes and scales mean: `float32(code) * scale`, rounded once to `dtype`.

    Args:
        codes: [R, C] float8_e4m3fn.
        scale: [ceil(R / block_rows), ceil(C / block_columns)] float32. Blocks of 1 by 128 read activations back.
        dtype: float32, bfloat16 or float16.

    Returns:
        [R, C], contiguous.

    Raises:
        ValueError: a wrong shape, dtype or block size.
    """
    if codes.ndim != 2 or codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"expected float8_e4m3fn codes [R, C], got {codes.dtype} {list(codes.shape)}")
    if dtype not in reference.WIDE:
        raise ValueError(f"expected dtype float32, bfloat16 or float16, got {dtype}")
    obstacle = _check_blocks(block_size)
    grid = reference.block_grid(codes.shape, block_size)
    if tuple(scale.shape) != grid or scale.dtype != torch.float32:
        raise ValueError(
            f"expected float32 scales {list(grid)} for {list(codes.shape)} codes in blocks of {list(block_size)}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    return _implementation(codes.device, obstacle).dequantize_blocks(codes, scale.detach(), *block_size, dtype)


def _prepare(x: Tensor, scale_format: str | None, block_size: tuple[int, int] = (GROUP, GROUP)):
    """Checks what a quantization is given; returns the module that does it and whether scales are powers of two."""
    if x.ndim != 2 or x.dtype not in reference.WIDE:
        raise ValueError(f"expected a float32, bfloat16 or float16 matrix, got {x.dtype} {list(x.shape)}")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    return _implementation(x.device, _check_blocks(block_size)), scale_format == "ue8m0"


def _check_blocks(block_size: tuple[int, int]) -> str | None:
    """Raises where a block size is none; returns why the Triton kernel cannot take it, if it cannot."""
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"expected two positive block sizes, got {block_size}")
    if all(size in (1, 2, 4, 8, 16, 32, 64, 128) for size in block_size):
        return None
    return f"its blocks are powers of two up to 128, got {list(block_size)}"


def _implementation(device: torch.device, unsupported: str | None):
    if dispatch.pick("fp8_quantize", device, unsupported) == "reference":
        return reference
    from . import kernel

    return kernel
