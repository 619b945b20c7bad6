"""Operands of FP8 products, what they mean in float64, and how close a product has to come."""

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
    """The same in memory whose rows start at multiples of 16 bytes, with NaN codes between them."""
    rows, columns = codes.shape
    memory = torch.full((rows, cdiv(columns, 16) * 16), 0x7F, dtype=torch.uint8, device=codes.device)
    memory[:, :columns] = codes.view(torch.uint8)
    return memory.view(torch.float8_e4m3fn)[:, :columns]


def random_codes(rows: int, columns: int) -> Tensor:
    """Every byte but the two NaN."""
    bits = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return in_padded_rows(bits.masked_fill_(bits & 0x7F == 0x7F, 0x07).view(torch.float8_e4m3fn))


def random_scale(*shape: int) -> Tensor:
    return torch.exp(torch.randn(shape) - 7)


def integer_codes(rows: int, columns: int, low: int = -4, high: int = 4) -> Tensor:
    return in_padded_rows(torch.randint(low, high + 1, (rows, columns)).to(torch.float8_e4m3fn))


def power_scale(*shape: int) -> Tensor:
    """1/2, 1 or 2."""
    return 2.0 ** torch.randint(-1, 2, shape)


def dequantized(codes: Tensor, scale: Tensor, parts: int = 1) -> Tensor:
    """[R, K] float64, each element by its own scale: of its row, or of its block of 128 x 128 in its part of the R."""
    rows, columns = codes.shape
    height = rows // parts
    own = torch.arange(rows) // height * cdiv(height, 128) + torch.arange(rows) % height // 128 if rows else []
    if scale.shape[0] == rows:
        own = torch.arange(rows)
    values = VALUES[codes.cpu().view(torch.uint8).long()]
    return values * scale.cpu().double()[own][:, torch.arange(columns) // 128]


def assert_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    """`got` is float64 a [M, K] @ b [N, K].T, summed in float32 and rounded once to its dtype.

    On a CPU: three roundings of a term for its scales and the product, and at most K sums, in whatever order, are
    K + 3 times 2^-24 relative to the sum of magnitudes, to first order; K + 4 covers the others (K < 2^12). The
    result's own rounding is relative to it, or absolute where it is subnormal.

    A GPU's FP8 units add 128 terms with some 14 bits, aligned to the largest; a bound for each element would be loose
    by the square root of the number of terms. KERNELS.md, section 12: 1e-3 in the Frobenius norm.
    """
    exact, device = a @ b.T, got.device
    assert got.shape == exact.shape
    own, got = torch.finfo(got.dtype), got.cpu().double()
    if device.type == "cuda":
        assert (got - exact).norm() <= (1e-3 + own.eps / 2) * exact.norm()
        return
    float32 = (a.shape[1] + 4) * 2.0**-24 * (a.abs() @ b.abs().T)
    bound = float32 + own.eps / 2 * (exact.abs() + float32).clamp(min=own.smallest_normal)
    worst = ((got - exact).abs() - bound).max() if bound.numel() else 0
    assert worst <= 0, f"beyond the bound by {worst}"
