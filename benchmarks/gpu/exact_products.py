"""Checks of products on a GPU: exact on integers, and long FP8 sums that must be promoted to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_kernels import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_grouped_wgrad,
    grouped_gemm,
    quantize_rows,
    use_backend,
)
from deepseek_kernels.common.fp8 import empty_codes, empty_scales

from ..operators.fp8_operands import PRODUCT_ERROR, ceil_div, wide
from ..operators.operands import Random
from ..operators.verify import Mismatch, require_equal
from .sizes import Sizes

__all__ = [
    "exact_grouped_gradients",
    "exact_grouped_products",
    "exact_products",
    "integer_codes",
    "power_scales",
    "promotion",
    "wide_double",
]


def integer_codes(random: Random, rows: int, columns: int) -> Tensor:
    """Returns integers from -2 to 2: a sum of 128 products of them fits into the 14 bits of the FP8 units."""
    codes = empty_codes(rows, columns, random.device)
    codes.copy_(random.integers(-2, 3, rows, columns).to(torch.float8_e4m3fn))
    return codes


def power_scales(random: Random, rows: int, columns: int, *, grid: bool = False) -> Tensor:
    """Returns scales of 1/2, 1 or 2, laid out as those of groups, or of blocks with `grid`."""
    powers = (1 << random.integers(0, 3, rows, columns)).float() / 2
    return powers if grid else empty_scales(rows, columns, random.device).copy_(powers)


def wide_double(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns codes times scales, in float64."""
    return wide(codes, scale).double()


def exact_products(device: torch.device, sizes: Sizes) -> None:
    """Checks `fp8_gemm` on integers with scales that are powers of two: every sum is exact, so the result is unique."""
    for m, n, k in sizes.products:
        random = Random(device, key=f"exact {m} {n} {k}")
        a, a_scale = integer_codes(random, m, k), power_scales(random, m, ceil_div(k))
        b = integer_codes(random, n, k)
        for b_scale in (
            power_scales(random, ceil_div(n), ceil_div(k), grid=True),
            power_scales(random, n, ceil_div(k)),
        ):
            right = (wide_double(a, a_scale) @ wide_double(b, b_scale).T).float()
            what = f"product {m}x{n}x{k} with scales {list(b_scale.shape)}"
            require_equal(fp8_gemm(a, a_scale, b, b_scale, torch.float32), right, what)


def _ragged_ends(rows: int, device: torch.device) -> Tensor:
    """The ends of four experts: some rows, none, one, and all other rows but the last."""
    return torch.tensor([rows // 3, rows // 3, rows // 3 + 1, rows - 1], device=device)


def _spans(ends: Tensor) -> list[tuple[int, slice]]:
    stops = ends.tolist()
    return [(expert, slice(start, stop)) for expert, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))]


def exact_grouped_products(device: torch.device, sizes: Sizes) -> None:
    """Checks `fp8_grouped_gemm` and `grouped_gemm` on integers, for experts with many rows, none and one."""
    for m, n, k in sizes.products:
        rows = max(m, 6)
        random, ends = Random(device, key=f"grouped {m} {n} {k}"), _ragged_ends(rows, device)
        x, x_scale = integer_codes(random, rows, k), power_scales(random, rows, ceil_div(k))
        weight = torch.stack([integer_codes(random, n, k) for _ in ends])
        w_scale = torch.stack([power_scales(random, ceil_div(n), ceil_div(k), grid=True) for _ in ends])
        right, plain = torch.zeros(2, rows, n, dtype=torch.float64, device=device)
        for expert, rows_of in _spans(ends):
            right[rows_of] = wide_double(x[rows_of], x_scale[rows_of]) @ wide_double(weight[expert], w_scale[expert]).T
            plain[rows_of] = x[rows_of].double() @ weight[expert].double().T
        got = fp8_grouped_gemm(x, x_scale, weight, w_scale, ends, torch.float32)
        require_equal(got, right.float(), f"grouped product {rows}x{n}x{k}")
        got = grouped_gemm(x.bfloat16(), weight.bfloat16(), ends)
        require_equal(got, plain.bfloat16(), f"grouped bfloat16 product {rows}x{n}x{k}")


def exact_grouped_gradients(device: torch.device, sizes: Sizes) -> None:
    """Checks `fp8_grouped_wgrad` on integers, in the layout of `quantize_grouped_transposed`."""
    m, n, k = sizes.products[0]
    random, ends = Random(device, key="gradient"), _ragged_ends(m, device)
    spans = [(expert, rows.stop - rows.start) for expert, rows in _spans(ends)]
    columns = sum(ceil_div(count) * 128 for _, count in spans)
    grad, x = integer_codes(random, n, columns), integer_codes(random, k, columns)
    grad_scale, x_scale = power_scales(random, n, columns // 128), power_scales(random, k, columns // 128)
    right = torch.zeros(len(ends), n, k, dtype=torch.float64, device=device)
    first = 0
    for expert, count in spans:
        for codes in (grad, x):  # columns without a token are zero
            codes[:, first + count : first + ceil_div(count) * 128] = 0
        span, groups = slice(first, first + ceil_div(count) * 128), slice(first // 128, first // 128 + ceil_div(count))
        right[expert] = (
            wide_double(grad[:, span], grad_scale[:, groups]) @ wide_double(x[:, span], x_scale[:, groups]).T
        )
        first = span.stop
    got = fp8_grouped_wgrad(grad, grad_scale, x, x_scale, ends, torch.float32)
    require_equal(got, right.float(), f"gradient {n}x{k} of {m} rows")


def promotion(device: torch.device, sizes: Sizes) -> None:
    """Checks a long sum of positive terms, which would lose a percent or more in the 14 bits of the FP8 units."""
    random = Random(device, key="promotion")
    with use_backend("reference"):
        operands = [quantize_rows(random.normal(128, sizes.long).abs()) for _ in range(2)]
    (a, a_scale), (b, b_scale) = operands
    right = wide_double(a, a_scale) @ wide_double(b, b_scale).T
    got = fp8_gemm(a, a_scale, b, b_scale, torch.float32).double()
    worst = float(((got - right) / right).abs().max())
    if not worst <= PRODUCT_ERROR:
        raise Mismatch(f"expected sums of {sizes.long} terms within {PRODUCT_ERROR:g} (relative), got {worst:.3g}")
