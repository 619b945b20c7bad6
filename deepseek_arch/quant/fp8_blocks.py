"""FP8 weights as the published checkpoints store them: e4m3 codes with one scale for each block of the matrix.

A checkpoint holds `X.weight` in float8_e4m3fn, [rows, columns], beside `X.weight_scale_inv`, [ceil(rows / 128),
ceil(columns / 128)]. Despite its name the scale is what the codes are *multiplied* by (TRAPS E1). The last block of a
row or column is partial, not padded: `kv_a_proj_with_mqa` of V3 has 576 rows and five rows of scales. The block size is
`weight_block_size` of the config and cannot be inferred from the two shapes (TRAPS E2).

Scales are float32 in V3 and R1; V3.1 and V3.2 restrict them to powers of two ("ue8m0") but still store float32; other
writers store the exponent byte b itself, meaning 2^(b - 127) (TRAPS E3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import deepseek_kernels as kernels
from deepseek_kernels.quant.fp8_quantize import FP8_MAX

__all__ = [
    "FP8_MAX",
    "FP8_QUANTIZATION",
    "block_grid",
    "decode_scale",
    "dequantize_blocks",
    "quantize_blocks",
    "scale_format_of",
]

# `quantization_config` of the published FP8 checkpoints.
FP8_QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
_WIDE = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the operators compute with


def block_grid(shape: tuple[int, ...] | torch.Size, block_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the number of blocks that cover a matrix of `shape`, down and across; edge blocks may be partial."""
    (rows, columns), (block_rows, block_columns) = shape, block_size
    return -(-rows // block_rows), -(-columns // block_columns)


def scale_format_of(quantization: Mapping[str, Any] | None) -> str | None:
    """Returns the format of new scales beside those of a `quantization_config`: "ue8m0", or None for float32."""
    return "ue8m0" if (quantization or {}).get("scale_fmt") == "ue8m0" else None


def decode_scale(scale: Tensor) -> Tensor:
    """Returns scales as float32: exponent bytes (float8_e8m0fnu or uint8) become 2^(b - 127), floats are widened.

    Raises:
        ValueError: a scale is negative, NaN or infinite, or the dtype holds no scales.
    """
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponent = scale.view(torch.uint8).int()
        # The byte is float32's own exponent field, but for its two ends: 0 is the subnormal 2^-127, 255 is NaN.
        bits = torch.where(exponent == 0, 1 << 22, exponent << 23)
        wide = bits.view(torch.float32)
    elif scale.dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = scale.float()
    else:
        raise ValueError(f"expected scales in float32, bfloat16, float16, float8_e8m0fnu or uint8, got {scale.dtype}")
    for right, what in ((wide.isfinite(), "finite scales"), (wide >= 0, "scales >= 0")):
        if not right.all():
            where = tuple((~right).nonzero()[0].tolist())
            raise ValueError(f"expected {what}, got {wide[where].item()} at {list(where)}")
    return wide


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    parts: int = 1,
) -> Tensor:
    """Returns the matrix `float32(code) * scale` of its block, rounded once to `dtype`.

    Args:
        codes: [R, C] or [E, R, C] float8_e4m3fn.
        scale: [(E,) parts * ceil(R / parts / block_rows), ceil(C / block_columns)], see `decode_scale`.
        out: a tensor of the codes' shape to write into instead of a new one; its dtype replaces `dtype`.
        parts: how many stacked matrices the rows are, each with a grid of its own: 2 for gate above up.

    Returns:
        The shape of `codes`. On a CPU the extra memory is one row of blocks.

    Raises:
        ValueError: wrong dtype or shape, or a scale that is negative or not finite.
    """
    wide, target = decode_scale(scale), dtype if out is None else out.dtype
    if target in _WIDE:
        return kernels.dequantize_blocks(codes, wide, block_size, target, parts, out)
    exact = kernels.dequantize_blocks(codes, wide, block_size, torch.float32, parts)
    return exact.to(target) if out is None else out.copy_(exact)


def quantize_blocks(
    weight: Tensor, block_size: tuple[int, int] = (128, 128), scale_format: str | None = None, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to FP8 codes with one scale for each block.

    Args:
        weight: [R, C] or [E, R, C], any floating dtype.
        scale_format: None for `amax / 448`, or "ue8m0" for the next power of two: rounded up *before* the division,
            so that the codes fit the scale that is stored (TRAPS E5).
        parts: as for `dequantize_blocks`.

    Returns:
        codes of the weight's shape, float8_e4m3fn, saturated at +-448 (TRAPS E6), and scales [(E,) parts *
        ceil(R / parts / block_rows), ceil(C / block_columns)] float32. A block of zeros gets a positive scale and zero
        codes (TRAPS E4).

    Raises:
        ValueError: not a matrix, a value that is not finite, or an unknown `scale_format`.
    """
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise ValueError(f"expected a floating-point matrix, got {weight.dtype} {list(weight.shape)}")
    wide = weight if weight.dtype in _WIDE else weight.float()
    codes, scale = kernels.quantize_blocks(wide, block_size, scale_format, parts)
    # The operator lets NaN and infinity through as NaN codes: e4m3's only ones, seven ones beside the sign.
    if codes.numel() and codes.view(torch.int8).bitwise_and(0x7F).amax() == 0x7F:
        raise ValueError("expected finite weights, got NaN or infinity")
    return codes, scale
