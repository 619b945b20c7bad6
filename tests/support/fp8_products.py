"""Operands of FP8 products, their values in float64, and the allowed error of a product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Sign, exponent of bias 7, three bits of mantissa, no infinity, two NaN. float64 holds code * scale exactly.
_POSITIVE = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
VALUES = torch.tensor([*_POSITIVE[:-1], math.nan, *(-v for v in _POSITIVE[:-1]), math.nan], dtype=torch.float64)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def in_padded_rows(codes: Tensor) -> Tensor:
    """Returns the codes in memory whose rows start at multiples of 16 bytes, with NaN between the rows."""
    rows, columns = codes.shape
    memory = torch.full((rows, cdiv(columns, 16) * 16), 0x7F, dtype=torch.uint8, device=codes.device)
    memory[:, :columns] = codes.view(torch.uint8)
    return memory.view(torch.float8_e4m3fn)[:, :columns]


def random_codes(rows: int, columns: int) -> Tensor:
    """Returns random bytes other than the two NaN."""
    bits = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return in_padded_rows(bits.masked_fill_(bits & 0x7F == 0x7F, 0x07).view(torch.float8_e4m3fn))


def random_scale(*shape: int) -> Tensor:
    return torch.exp(torch.randn(shape) - 7)


def integer_codes(rows: int, columns: int, low: int = -4, high: int = 4) -> Tensor:
    return in_padded_rows(torch.randint(low, high + 1, (rows, columns)).to(torch.float8_e4m3fn))


def power_scale(*shape: int) -> Tensor:
    """Returns random scales of 1/2, 1 or 2."""
    return 2.0 ** torch.randint(-1, 2, shape)


def dequantized(codes: Tensor, scale: Tensor, parts: int = 1) -> Tensor:
    """Returns values [R, K] in float64, with scales of rows, or of blocks of 128 x 128 in each part of the R rows."""
    rows, columns = codes.shape
    height = rows // parts
    grid_row = torch.arange(rows) // height * cdiv(height, 128) + torch.arange(rows) % height // 128 if rows else []
    if scale.shape[0] == rows:
        grid_row = torch.arange(rows)
    values = VALUES[codes.cpu().view(torch.uint8).long()]
    return values * scale.cpu().double()[grid_row][:, torch.arange(columns) // 128]


def assert_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    """Asserts that `got` is float64 a [M, K] @ b [N, K].T, summed in float32 and rounded once to its dtype.

    On a CPU, three roundings of a term for its scales and the product, and at most K sums in any order, are K + 3 times
    2^-24 relative to the sum of magnitudes, to first order; K + 4 covers the other orders (K < 2^12). The rounding of
    the result is relative to it, or absolute if it is subnormal.

    The FP8 units of a GPU add 32 terms with some 14 bits, aligned to the largest, before 128 terms are promoted to
    float32 (the V3 report, arXiv 2412.19437, section 3.3.2, found about 14 bits). A bound for each element would be
    loose by the square root of the number of terms, so that the Frobenius norm is bounded: four sums lose 4 * 2^-13 at
    most, 4.9e-4, and 1e-3 is twice that.
    """
    exact, device = a @ b.T, got.device
    assert got.shape == exact.shape
    finfo, got = torch.finfo(got.dtype), got.cpu().double()
    if device.type == "cuda":
        assert (got - exact).norm() <= (1e-3 + finfo.eps / 2) * exact.norm()
        return
    float32 = (a.shape[1] + 4) * 2.0**-24 * (a.abs() @ b.abs().T)
    bound = float32 + finfo.eps / 2 * (exact.abs() + float32).clamp(min=finfo.smallest_normal)
    worst = ((got - exact).abs() - bound).max() if bound.numel() else 0
    assert worst <= 0, f"beyond the bound by {worst}"


def b_groups(n: int, k: int, by_rows: bool) -> tuple[int, int]:
    return (n if by_rows else cdiv(n, 128)), cdiv(k, 128)


def random_operands(m: int, n: int, k: int, by_rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = random_scale(m, cdiv(k, 128)), random_scale(*b_groups(n, k, by_rows))
    return random_codes(m, k), scales[0], random_codes(n, k), scales[1]


def integer_operands(m: int, n: int, k: int, by_rows: bool, low: int = -4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns integers whose group sums have 12 bits at most: exact in the FP8 units and in float32."""
    scales = power_scale(m, cdiv(k, 128)), power_scale(*b_groups(n, k, by_rows))
    return integer_codes(m, k, low), scales[0], integer_codes(n, k, low), scales[1]


def exact(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Returns the exact product of `integer_operands`, computed in int64: scales are multiples of one half."""
    doubled = [(2 * dequantized(codes, scale)).long() for codes, scale in ((a, a_scale), (b, b_scale))]
    return (doubled[0] @ doubled[1].T).double() / 4


def on(device: torch.device, operands: tuple[Tensor, ...]) -> list[Tensor]:
    """Moves operands to a device, matrices of codes in padded rows again."""
    moved = [operand.to(device) for operand in operands]
    return [in_padded_rows(x) if x.dtype == torch.float8_e4m3fn and x.ndim == 2 else x for x in moved]


# ---------------------------------------------------------------- products grouped by expert


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0)


def spans(ends: Tensor) -> list[tuple[int, int, int]]:
    starts = [0, *ends.tolist()]
    return [(expert, starts[expert], end) for expert, end in enumerate(ends.tolist())]


def grouped_operands(
    counts: list[int], nobody: int, n: int, k: int, parts: int = 1, integers: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns x, x_scale, weight, weight_scale and ends.

    The last `nobody` rows belong to no expert and are NaN: they must not be read, or must not affect others.
    """
    codes, scale = (integer_codes, power_scale) if integers else (random_codes, random_scale)
    rows, experts, groups = sum(counts) + nobody, len(counts), cdiv(k, 128)
    x, x_scale = codes(rows, k), scale(rows, groups)
    x.view(torch.uint8)[sum(counts) :] = 0x7F
    x_scale[sum(counts) :] = torch.nan
    weight = in_padded_rows(codes(experts * n, k)).unflatten(0, (experts, n))
    return x, x_scale, weight, scale(experts, parts * cdiv(n // parts, 128), groups), ends_of(counts)


def transposed_operands(
    counts: list[int], n: int, k: int, integers: bool = False, columns: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns operands in the layout of `quantize_grouped_transposed`: each expert begins a group, padded with zeros.

    Columns after those of the last expert are NaN: the products must not depend on their number.
    """
    codes, scale = (integer_codes, power_scale) if integers else (random_codes, random_scale)
    used = sum(cdiv(count, 128) for count in counts) * 128
    columns = used + 128 if columns is None else columns
    result = []
    for height in (n, k):
        matrix, matrix_scale = codes(height, columns), scale(height, columns // 128)
        bytes_, first = matrix.view(torch.uint8), 0
        for count in counts:
            bytes_[:, first + count : first + cdiv(count, 128) * 128] = 0
            first += cdiv(count, 128) * 128
        bytes_[:, used:], matrix_scale[:, used // 128 :] = 0x7F, torch.nan
        result += [matrix, matrix_scale]
    return *result, ends_of(counts)
