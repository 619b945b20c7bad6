"""FP8 quantization in plain PyTorch: the semantics that the kernels reproduce bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128
FP8_MAX = 448.0  # largest finite float8_e4m3fn
WIDE = (torch.float32, torch.bfloat16, torch.float16)
# The least amax that a scale is made of: DeepSeek's for activations, the least normal scale for weights.
ACTIVATION_FLOOR = 1e-4
WEIGHT_FLOOR = FP8_MAX * torch.finfo(torch.float32).tiny


def block_grid(shape: torch.Size | tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, int]:
    """How many blocks cover a matrix of `shape`, down and across; edge blocks may be partial."""
    (rows, columns), (block_rows, block_columns) = shape, block_size
    return -(-rows // block_rows), -(-columns // block_columns)


def empty_codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns] float8_e4m3fn, each row at a multiple of 16 bytes: what the copy engine of a Hopper GPU needs."""
    return torch.empty(rows, -(-columns // 16) * 16, dtype=torch.float8_e4m3fn, device=device)[:, :columns]


def empty_scales(rows: int, groups: int, device: torch.device) -> Tensor:
    """[rows, groups] float32, stored column by column, each column at a multiple of 16 bytes."""
    return torch.empty(groups, -(-rows // 4) * 4, dtype=torch.float32, device=device)[:, :rows].T


def scale_of(amax: Tensor, floor: float, power_of_two: bool) -> Tensor:
    """The float32 scale of groups whose largest magnitudes are `amax`."""
    scale = amax.clamp(min=floor) / FP8_MAX
    if not power_of_two:
        return scale
    bits = scale.view(torch.int32)  # never subnormal, so the exponent field says it all; infinity stays
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0).int() << 23).view(torch.float32)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes of float32 values, `scale` broadcast to them."""
    quotient = x / scale.masked_fill(scale.isinf(), torch.nan)
    # Rounded quotients exceed 448 by an ulp at most, which rounds down to 448: the clamp is for those who change this
    # (TRAPS E6). Every NaN becomes the positive one, as it does on a GPU.
    return quotient.clamp(-FP8_MAX, FP8_MAX).masked_fill(quotient.isnan(), torch.nan).to(torch.float8_e4m3fn)


def decode(codes: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exactly, several times faster on a CPU than torch's own conversion.

    The bits s eeee mmm, put at the same places of a float16 (s 0eeee mmm0000000), are the same number but for the
    exponent bias, 15 instead of 7: a factor 2^8. Subnormals follow the same rule; only NaN, all ones, does not.
    """
    signed = codes.view(torch.int8)
    bits = (signed.to(torch.int16) << 7) & ~(1 << 14)  # the sign fills the upper byte
    wide = bits.view(torch.float16).float() * 256.0
    return wide.masked_fill_((signed & 0x7F) == 0x7F, torch.nan)


def magnitude(x: Tensor) -> Tensor:
    """|x|, and zero for NaN, which therefore decides no scale."""
    return x.abs().masked_fill(x.isnan(), 0.0)


def quantize_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    groups = -(-columns // GROUP)
    padded = F.pad(x.float(), (0, groups * GROUP - columns)).reshape(rows, groups, GROUP)
    codes, scales = empty_codes(rows, columns, x.device), empty_scales(rows, groups, x.device)
    scales.copy_(scale_of(magnitude(padded).amax(-1), ACTIVATION_FLOOR, power_of_two))
    codes.copy_(encode(padded, scales[:, :, None]).reshape(rows, groups * GROUP)[:, :columns])
    return codes, scales


def quantize_transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return quantize_rows(x.T, power_of_two)


def quantize_both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *quantize_rows(x, power_of_two), *quantize_rows(x.T, power_of_two)


def quantize_blocks(weight: Tensor, block_rows: int, block_columns: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """One row of blocks at a time: a float32 copy of the whole weight would double the memory of a conversion."""
    down, across = block_grid(weight.shape, (block_rows, block_columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(down, across, dtype=torch.float32, device=weight.device)
    for block in range(down):
        band = slice(block * block_rows, (block + 1) * block_rows)
        wide = weight[band].float()  # [block_rows, C]
        padded = F.pad(magnitude(wide), (0, across * block_columns - wide.shape[1]))
        amax = padded.unflatten(1, (across, block_columns)).amax((0, 2))  # [blocks across]
        scale[block] = scale_of(amax, WEIGHT_FLOOR, power_of_two)
        codes[band] = encode(wide, scale[block].repeat_interleave(block_columns)[: wide.shape[1]])
    return codes, scale


def dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    per_column = scale.repeat_interleave(block_columns, dim=1)[:, : codes.shape[1]]  # [blocks down, C]
    for block, factors in enumerate(per_column):
        band = slice(block * block_rows, (block + 1) * block_rows)
        out[band] = decode(codes[band]) * factors
    return out
