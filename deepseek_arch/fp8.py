"""FP8 weights as the published checkpoints store them: e4m3 codes with one scale for each block of the matrix.

A checkpoint holds `X.weight` in float8_e4m3fn, [rows, columns], beside `X.weight_scale_inv`, [ceil(rows / 128),
ceil(columns / 128)]. Despite its name the scale is what the codes are *multiplied* by (TRAPS E1). The last block of a
row or column is partial, not padded: `kv_a_proj_with_mqa` of V3 has 576 rows and five rows of scales. The block size is
`weight_block_size` of the config and cannot be inferred from the two shapes (TRAPS E2).

Scales are float32 in V3 and R1; V3.1 and V3.2 restrict them to powers of two ("ue8m0") but still store float32; other
writers store the exponent byte b itself, meaning 2^(b - 127) (TRAPS E3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FP8_MAX", "block_grid", "decode_scale", "dequantize_blocks", "quantize_blocks"]

FP8_MAX = 448.0  # largest finite float8_e4m3fn


def block_grid(shape: tuple[int, ...] | torch.Size, block_size: tuple[int, int]) -> tuple[int, int]:
    """How many blocks cover a matrix of `shape`, down and across; edge blocks may be partial."""
    (rows, columns), (block_rows, block_columns) = shape, block_size
    return -(-rows // block_rows), -(-columns // block_columns)


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as float32: exponent bytes (float8_e8m0fnu or uint8) become 2^(b - 127), floats are widened.

    Raises:
        ValueError: a scale is NaN or infinite, or the dtype holds no scales.
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
    finite = wide.isfinite()
    if not finite.all():
        where = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"expected finite scales, got {wide[where].item()} at {list(where)}")
    return wide


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The matrix that FP8 codes mean: `float32(code) * scale` of its block, rounded once to `dtype`.

    Args:
        codes: [R, C] float8_e4m3fn.
        scale: [ceil(R / block_rows), ceil(C / block_columns)], see `decode_scale`.
        out: [R, C] tensor to write into instead of a new one; its dtype replaces `dtype`.

    Returns:
        [R, C]. The extra memory is one row of blocks.

    Raises:
        ValueError: wrong dtype or shape, or a scale that is not finite.
    """
    if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2:
        raise ValueError(f"expected float8_e4m3fn codes [R, C], got {codes.dtype} {list(codes.shape)}")
    grid = block_grid(codes.shape, block_size)
    if tuple(scale.shape) != grid:
        raise ValueError(
            f"expected scales {list(grid)} for a {list(codes.shape)} matrix in blocks of {list(block_size)}, "
            f"got {list(scale.shape)}"
        )
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    elif out.shape != codes.shape:
        raise ValueError(f"expected out {list(codes.shape)}, got {list(out.shape)}")
    rows, columns = block_size
    per_column = decode_scale(scale).repeat_interleave(columns, dim=1)[:, : codes.shape[1]]  # [blocks down, C]
    for block, factors in enumerate(per_column):
        band = slice(block * rows, (block + 1) * rows)
        out[band].copy_(_decode(codes[band]).mul_(factors))
    return out


def _decode(codes: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exactly, several times faster on a CPU than torch's own conversion.

    The bits s eeee mmm, put at the same places of a float16 (s 0eeee mmm0000000), are the same number but for the
    exponent bias, 15 instead of 7: a factor 2^8. Subnormals follow the same rule; only NaN, all ones, does not.
    """
    signed = codes.view(torch.int8)
    bits = signed.to(torch.int16)  # the sign fills the upper byte
    bits = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    wide = bits.view(torch.float16).to(torch.float32).mul_(256.0)
    # A maximum is many times faster than a comparison here, and NaN codes are almost never there.
    magnitude = signed.bitwise_and(0x7F)
    if magnitude.numel() and magnitude.amax() == 0x7F:
        wide.masked_fill_(magnitude == 0x7F, float("nan"))
    return wide


def quantize_blocks(
    weight: Tensor, block_size: tuple[int, int] = (128, 128), scale_format: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to FP8 codes with one scale for each block.

    Args:
        weight: [R, C], any floating dtype.
        scale_format: None for `amax / 448`, or "ue8m0" for the next power of two: rounded up *before* the division,
            so that the codes fit the scale that is stored (TRAPS E5).

    Returns:
        codes [R, C] float8_e4m3fn, saturated at +-448 (TRAPS E6), and scales [ceil(R / block_rows),
        ceil(C / block_columns)] float32. A block of zeros gets a positive scale and zero codes (TRAPS E4).

    Raises:
        ValueError: not a matrix, a value that is not finite, or an unknown `scale_format`.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a floating-point matrix, got {weight.dtype} {list(weight.shape)}")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    rows, columns = block_size
    down, across = block_grid(weight.shape, block_size)
    scale = torch.empty(down, across, dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for block in range(down):
        band = slice(block * rows, (block + 1) * rows)
        wide = weight[band].float()  # [block_rows, C]
        padded = F.pad(wide, (0, across * columns - wide.shape[1]))
        amax = padded.abs().unflatten(1, (across, columns)).amax(dim=(0, 2))  # [blocks across]
        if not amax.isfinite().all():
            raise ValueError("expected finite weights, got NaN or infinity")
        scale[block] = _round_up_to_power_of_two(_scale_of(amax)) if scale_format else _scale_of(amax)
        factors = scale[block].repeat_interleave(columns)[: wide.shape[1]]
        codes[band] = (wide / factors).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scale


def _scale_of(amax: Tensor) -> Tensor:
    # The smallest normal float32 keeps zero and nearly zero blocks away from a division by zero.
    return (amax / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)


def _round_up_to_power_of_two(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
