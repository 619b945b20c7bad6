"""FP8 quantization in plain PyTorch: the semantics that the kernels reproduce bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.fp8 import (
    ACTIVATION_FLOOR,
    FP8_MAX,
    GROUP,
    WEIGHT_FLOOR,
    block_grid,
    decode,
    empty_codes,
    empty_scales,
)
from ...common.host import cdiv

__all__ = [
    "dequantize_into",
    "encode",
    "grouped_capacity",
    "magnitude",
    "matrices",
    "quantize_blocks",
    "quantize_both",
    "quantize_grouped_transposed",
    "quantize_rows",
    "quantize_transposed",
    "scale_of",
]


def matrices(stacked: Tensor, parts: int) -> list[Tensor]:
    """Returns the matrices that a [(E,) R, C] tensor consists of, as views: `parts` for each expert."""
    size = stacked.shape[-2] // parts
    experts = stacked if stacked.ndim == 3 else stacked[None]
    return [expert[part * size : (part + 1) * size] for expert in experts for part in range(parts)]


def scale_of(amax: Tensor, floor: float, power_of_two: bool) -> Tensor:
    """Returns the float32 scale of groups whose largest magnitudes are `amax`."""
    scale = amax.clamp(min=floor) / FP8_MAX
    if not power_of_two:
        return scale
    bits = scale.view(torch.int32)  # never subnormal, so the exponent field is complete; infinity stays
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0).int() << 23).view(torch.float32)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """Returns the e4m3 values of float32 `x / scale`, `scale` broadcast."""
    quotient = x / scale.masked_fill(scale.isinf(), torch.nan)
    # Rounded quotients exceed 448 by an ulp at most, which rounds down to 448: the clamp guards against a change here
    # (TRAPS E6). Every NaN becomes the positive one, as it does on a GPU.
    quotient = torch.nan_to_num_(quotient, torch.nan, torch.inf, -torch.inf).clamp_(-FP8_MAX, FP8_MAX)
    return quotient.to(torch.float8_e4m3fn)


def magnitude(x: Tensor) -> Tensor:
    """Returns |x|, and zero for NaN, which therefore decides no scale."""
    return x.abs().nan_to_num_(0.0, torch.inf)


def quantize_rows(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    groups = cdiv(columns, GROUP)
    padded = F.pad(x.float(), (0, groups * GROUP - columns)).reshape(rows, groups, GROUP)
    codes, scales = empty_codes(rows, columns, x.device), empty_scales(rows, groups, x.device)
    scales.copy_(scale_of(magnitude(padded).amax(-1), ACTIVATION_FLOOR, power_of_two))
    codes.copy_(encode(padded, scales[:, :, None]).reshape(rows, groups * GROUP)[:, :columns])
    return codes, scales


def quantize_transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return quantize_rows(x.T, power_of_two)


def quantize_both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *quantize_rows(x, power_of_two), *quantize_rows(x.T, power_of_two)


def grouped_capacity(rows: int, experts: int) -> int:
    """Returns the most columns that `quantize_grouped_transposed` can need."""
    return cdiv(rows + (GROUP - 1) * min(experts, rows), GROUP) * GROUP


def quantize_grouped_transposed(x: Tensor, ends: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    columns = grouped_capacity(x.shape[0], ends.shape[0])
    codes, scales = empty_codes(x.shape[1], columns, x.device), empty_scales(x.shape[1], columns // GROUP, x.device)
    codes.copy_(torch.zeros((), device=x.device))
    scales.copy_(scale_of(torch.zeros((), device=x.device), ACTIVATION_FLOOR, power_of_two))
    previous = group = 0
    for end in ends.tolist():
        own, own_scales = quantize_transposed(x[previous:end], power_of_two)
        codes[:, group * GROUP :][:, : end - previous] = own
        scales[:, group : group + own_scales.shape[1]] = own_scales
        previous, group = end, group + own_scales.shape[1]
    return codes, scales


def quantize_blocks(
    weight: Tensor, block_rows: int, block_columns: int, power_of_two: bool, parts: int
) -> tuple[Tensor, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    grid = block_grid(weight.shape, (block_rows, block_columns), parts)
    scale = torch.empty(grid, dtype=torch.float32, device=weight.device)
    for own in zip(matrices(weight, parts), matrices(codes, parts), matrices(scale, parts), strict=True):
        _quantize_matrix(*own, block_rows, block_columns, power_of_two)
    return codes, scale


def _quantize_matrix(
    weight: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, power_of_two: bool
) -> None:
    """Quantizes one row of blocks at a time: a float32 copy of the whole weight would double a conversion's memory."""
    across, columns = scale.shape[1], weight.shape[1]
    for block in range(scale.shape[0]):
        band = slice(block * block_rows, (block + 1) * block_rows)
        wide = weight[band].float()  # [block_rows, C]
        padded = F.pad(magnitude(wide).amax(0), (0, across * block_columns - columns))
        amax = padded.unflatten(0, (across, block_columns)).amax(1)  # [blocks across]
        scale[block] = scale_of(amax, WEIGHT_FLOOR, power_of_two)
        codes[band] = encode(wide, scale[block].repeat_interleave(block_columns)[:columns])


def dequantize_into(out: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, parts: int) -> None:
    """Dequantizes one row of blocks at a time: the extra memory is a float32 copy of it."""
    for target, own, factors in zip(matrices(out, parts), matrices(codes, parts), matrices(scale, parts), strict=True):
        per_column = factors.repeat_interleave(block_columns, dim=1)[:, : own.shape[1]]  # [blocks down, C]
        for block, row in enumerate(per_column):
            band = slice(block * block_rows, (block + 1) * block_rows)
            target[band] = decode(own[band]).mul_(row)
