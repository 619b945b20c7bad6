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


def block_grid(shape: torch.Size | tuple[int, ...], block_size: tuple[int, int], parts: int = 1) -> tuple[int, ...]:
    """Shape of the scales of a [(E,) R, C] weight, its rows `parts` stacked matrices; edge blocks may be partial."""
    (*experts, rows, columns), (block_rows, block_columns) = shape, block_size
    return (*experts, parts * -(-(rows // parts) // block_rows), -(-columns // block_columns))


def matrices(stacked: Tensor, parts: int) -> list[Tensor]:
    """The matrices that a [(E,) R, C] tensor consists of, as views: `parts` for each expert."""
    size = stacked.shape[-2] // parts
    experts = stacked if stacked.ndim == 3 else stacked[None]
    return [expert[part * size : (part + 1) * size] for expert in experts for part in range(parts)]


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
    quotient = torch.nan_to_num_(quotient, torch.nan, torch.inf, -torch.inf).clamp_(-FP8_MAX, FP8_MAX)
    return quotient.to(torch.float8_e4m3fn)


def decode(codes: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exactly, several times faster on a CPU than torch's own conversion.

    The bits s eeee mmm, put at the same places of a float16 (s 0eeee mmm0000000), are the same number but for the
    exponent bias, 15 instead of 7: a factor 2^8. Subnormals follow the same rule. NaN, all ones, is the one code where
    adding a unit to the last place reaches the free bit of the exponent; set there, it makes a NaN of the float16.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    bits |= (bits + (1 << 7)).bitwise_and_(1 << 14)
    return bits.view(torch.float16).float().mul_(256.0)


def magnitude(x: Tensor) -> Tensor:
    """|x|, and zero for NaN, which therefore decides no scale."""
    return x.abs().nan_to_num_(0.0, torch.inf)


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


def grouped_capacity(rows: int, experts: int) -> int:
    """Columns that `quantize_grouped_transposed` needs at most."""
    return -(-(rows + (GROUP - 1) * min(experts, rows)) // GROUP) * GROUP


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
    """One row of blocks at a time: a float32 copy of the whole weight would double the memory of a conversion."""
    across, columns = scale.shape[1], weight.shape[1]
    for block in range(scale.shape[0]):
        band = slice(block * block_rows, (block + 1) * block_rows)
        wide = weight[band].float()  # [block_rows, C]
        padded = F.pad(magnitude(wide).amax(0), (0, across * block_columns - columns))
        amax = padded.unflatten(0, (across, block_columns)).amax(1)  # [blocks across]
        scale[block] = scale_of(amax, WEIGHT_FLOOR, power_of_two)
        codes[band] = encode(wide, scale[block].repeat_interleave(block_columns)[:columns])


def dequantize_into(out: Tensor, codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, parts: int) -> None:
    """One row of blocks at a time: the extra memory is a float32 copy of it."""
    for target, own, factors in zip(matrices(out, parts), matrices(codes, parts), matrices(scale, parts), strict=True):
        per_column = factors.repeat_interleave(block_columns, dim=1)[:, : own.shape[1]]  # [blocks down, C]
        for block, row in enumerate(per_column):
            band = slice(block * block_rows, (block + 1) * block_rows)
            target[band] = decode(own[band]).mul_(row)
