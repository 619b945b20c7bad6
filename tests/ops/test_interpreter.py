"""The interpreter's corrections: each is right against arithmetic on the bits, and each is still needed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402  (skips above where there is no triton)

from deepseek_kernels.testing.interpreter import (  # noqa: E402
    InterpreterChangedError,
    corrected_interpreter,
    interprets,
)
from deepseek_kernels.testing.numeric import assert_bitwise  # noqa: E402

pytestmark = pytest.mark.skipif(not interprets(), reason="TRITON_INTERPRET is not 1: kernels run on the GPU")

FORMATS = {torch.bfloat16: (8, 127, None), torch.float8_e4m3fn: (4, 7, 448.0), torch.float8_e5m2: (3, 15, 57344.0)}


@triton.jit
def _cast_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(a, b, out, truth, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + 0 * SIZE + at, x + y)
    tl.store(out + 1 * SIZE + at, x - y)
    tl.store(out + 2 * SIZE + at, x * y)
    tl.store(out + 3 * SIZE + at, tl.maximum(x, y))
    tl.store(out + 4 * SIZE + at, tl.minimum(x, y))
    tl.store(out + 5 * SIZE + at, -x)
    tl.store(out + 6 * SIZE + at, tl.abs(x))
    tl.store(out + 7 * SIZE + at, tl.where(x < y, x, y))
    tl.store(out + 8 * SIZE + at, tl.fma(x, y, x))
    tl.store(truth + 0 * SIZE + at, x < y)
    tl.store(truth + 1 * SIZE + at, x >= y)
    tl.store(truth + 2 * SIZE + at, x == y)


@triton.jit
def _reduce_kernel(x, largest, least, where, total, running, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(x + at)
    found, index = tl.max(values, 1, return_indices=True)
    tl.store(largest + row, found)
    tl.store(where + row, index)
    tl.store(least + row, tl.min(values, 1))
    tl.store(total + row, tl.sum(values, 1))
    tl.store(running + at, tl.cumsum(values, 1))


@triton.jit
def _dot_kernel(a, b, out, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, k, column = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    left = tl.load(a + row[:, None] * DEPTH + k[None, :])
    right = tl.load(b + k[:, None] * COLUMNS + column[None, :])
    tl.store(out + row[:, None] * COLUMNS + column[None, :], tl.dot(left, right))


@triton.jit
def _constant_kernel(out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.full([SIZE], 1.375, tl.bfloat16) + at.to(tl.bfloat16))


@triton.jit
def _fma_kernel(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


@triton.jit
def _extremes_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + 0 * SIZE + at, tl.maximum(x, y))
    tl.store(out + 1 * SIZE + at, tl.minimum(x, y))
    tl.store(out + 2 * SIZE + at, tl.clamp(x, -0.5, 0.5))


def numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit or smaller format, ascending, as float64."""
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    every = torch.arange(256**dtype.itemsize).to(torch.int32).to(integers).view(dtype).double()
    return every[every.isfinite()].unique()


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to the nearest number of `dtype`, ties to the one with an even code: a search, not a cast.

    FP8 saturates; bfloat16 overflows to infinity half a step above its largest number.
    """
    table, wide = numbers(dtype), x.double()
    limit = FORMATS[dtype][2] or math.inf
    above = torch.searchsorted(table, wide.clamp(table[0], table[-1]).nan_to_num()).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    # Neighbors have consecutive codes, so one of the two is even, and so is their distance in steps from zero.
    even_high = (above - (len(table) - 1) // 2) % 2 == 0
    up = (high - wide < wide - low) | ((high - wide == wide - low) & even_high)
    out = torch.where(up, high, low)
    overflow = table[-1] + (table[-1] - table[-2]) / 2
    out = torch.where(wide.abs() >= overflow, torch.full_like(wide, limit).copysign(wide), out)
    return torch.where(wide.isnan(), wide, out.copysign(wide)).to(dtype)


def samples(dtype: torch.dtype) -> Tensor:
    """float32 numbers around everything that a cast to `dtype` decides on; a power of two of them."""
    table = numbers(dtype)
    ties = ((table[1:] + table[:-1]) / 2).float()  # exact: float32 has more bits than any of the formats
    near = torch.cat([ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf))])
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38, -3e38, 449.0, 463.9, 464.0, 480.0, -600.0, 1e6]
    spread = torch.randn(4096) * 2.0 ** torch.randint(-20, 20, (4096,))
    every = torch.cat([torch.tensor(special), table.float(), near, spread])
    return torch.cat([every, torch.zeros(2 ** math.ceil(math.log2(len(every))) - len(every))])


def assert_same_numbers(got: Tensor, expected: Tensor) -> None:
    """Bitwise, but for the sign and payload of NaN."""
    assert torch.equal(got.isnan(), expected.isnan())
    blank = torch.zeros((), dtype=got.dtype)
    assert_bitwise(torch.where(got.isnan(), blank, got), torch.where(expected.isnan(), blank, expected))


def check_cast(dtype: torch.dtype) -> None:
    """float32 -> `dtype` -> float32, ties, carries, saturation, subnormals, infinities and NaN."""
    x = samples(dtype)
    got, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    _cast_kernel[(1,)](x, got, SIZE=len(x))
    assert_same_numbers(got, nearest(x, dtype))
    _cast_kernel[(1,)](got, back, SIZE=len(x))
    assert_same_numbers(back, got.float())


def check_half(dtype: torch.dtype) -> None:
    """float16 -> `dtype`, rounded once, and `dtype` -> float16 for numbers that it holds."""
    x = samples(dtype).half()
    got, back = torch.empty(len(x), dtype=dtype), torch.empty_like(x)
    _cast_kernel[(1,)](x, got, SIZE=len(x))
    assert_same_numbers(got, nearest(x, dtype))
    fits = got.double().masked_fill(got.double().abs() > 60000, 0.0).to(dtype)
    _cast_kernel[(1,)](fits, back, SIZE=len(x))
    assert_same_numbers(back, fits.half())


def check_double() -> None:
    """float64 -> bfloat16, for numbers that float32 holds."""
    x = samples(torch.bfloat16).double()
    got = torch.empty(len(x), dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, got, SIZE=len(x))
    assert_same_numbers(got, nearest(x, torch.bfloat16))


def check_arithmetic() -> None:
    """bfloat16 sums, products, extremes, signs and comparisons: computed exactly, then rounded once."""
    a, b = torch.randn(2, 1024).bfloat16()
    a[:4], b[:4] = torch.tensor([0.0, -0.0, 1.0, -3.0]), torch.tensor([-0.0, 0.0, 1.0, -3.0])
    out, truth = torch.empty(9, 1024, dtype=torch.bfloat16), torch.empty(3, 1024, dtype=torch.bool)
    _arithmetic_kernel[(1,)](a, b, out, truth, SIZE=1024)
    x, y = a.double(), b.double()
    exact = [x + y, x - y, x * y, x.maximum(y), x.minimum(y), -x, x.abs(), x.where(x < y, y), x * y + x]
    for got, expected in zip(out, exact, strict=True):
        zero = torch.zeros_like(got)  # the sign of max(0, -0), and of -(0) in Triton 3.6, is not specified
        assert_bitwise(torch.where(got == 0, zero, got), torch.where(expected == 0, zero, nearest(expected, got.dtype)))
    for got, expected in zip(truth, [x < y, x >= y, x == y], strict=True):
        assert torch.equal(got, expected)


def check_reductions() -> None:
    """bfloat16 extremes with their places, sums and running sums; integers, so that every order gives the same."""
    x = torch.randint(-8, 8, (16, 32)).bfloat16()
    largest, least, total = (torch.empty(16, dtype=torch.bfloat16) for _ in range(3))
    where, running = torch.empty(16, dtype=torch.int32), torch.empty_like(x)
    _reduce_kernel[(1,)](x, largest, least, where, total, running, ROWS=16, COLUMNS=32)
    assert_bitwise(largest, x.amax(1))
    assert_bitwise(least, x.amin(1))
    assert torch.equal(where.long(), (x == x.amax(1, keepdim=True)).int().argmax(1))  # the leftmost
    assert_bitwise(total, x.float().sum(1).bfloat16())
    assert_bitwise(running, x.float().cumsum(1).bfloat16())


def check_dot(dtype: torch.dtype) -> None:
    """A product of numbers whose sums float32 holds exactly, and a NaN that reaches its row."""
    a, b = (torch.randint(-8, 9, (16, 64)) / 4).to(dtype), (torch.randint(-8, 9, (64, 32)) / 4).to(dtype)
    a[3, 5] = math.nan
    out = torch.empty(16, 32)
    _dot_kernel[(1,)](a, b, out, ROWS=16, DEPTH=64, COLUMNS=32)
    expected = (a.double() @ b.double()).float()
    assert expected[3].isnan().all() and not expected[[0, 1, 2, 4]].isnan().any()
    assert_same_numbers(out, expected)


def check_constants() -> None:
    """A bfloat16 constant, and integers turned into bfloat16."""
    out = torch.empty(64, dtype=torch.bfloat16)
    _constant_kernel[(1,)](out, SIZE=64)
    assert_bitwise(out, (1.375 + torch.arange(64.0)).bfloat16())


def check_fma() -> None:
    """float32 x * y + z, rounded once: also where the product's error decides."""
    x, y = torch.randn(2, 4096)
    z = -(x * y) + torch.randn(4096) * (torch.arange(4096) % 2)
    out = torch.empty(4096)
    _fma_kernel[(1,)](x, y, z, out, SIZE=4096)
    # x * y is exact in float64; so is its sum with a rounded -x * y, and half of the cases are just that.
    exact = (x.double() * y.double() + z.double()).float()
    assert_bitwise(out[::2], exact[::2])
    assert ((out - exact).abs() <= exact.abs() * 2.0**-23).all()


def check_extremes_with_nan() -> None:
    """float32 maximum, minimum and clamp prefer a number to a NaN."""
    x, y, out = torch.randn(64), torch.randn(64), torch.empty(3, 64)
    x[::2], y[::3] = math.nan, math.nan
    _extremes_kernel[(1,)](x, y, out, SIZE=64)
    assert_same_numbers(out, torch.stack([x.fmax(y), x.fmin(y), x.fmax(torch.tensor(-0.5)).fmin(torch.tensor(0.5))]))


# What Triton gets wrong on its own, from 3.6 to 3.9; and what it has learned in between.
WRONG: dict[str, Callable[[], None]] = {
    "cast to bfloat16": lambda: check_cast(torch.bfloat16),
    "cast to e4m3": lambda: check_cast(torch.float8_e4m3fn),
    "cast to e5m2": lambda: check_cast(torch.float8_e5m2),
    "e4m3 and float16": lambda: check_half(torch.float8_e4m3fn),
    "bfloat16 and float16": lambda: check_half(torch.bfloat16),
    "float64 to bfloat16": check_double,
    "bfloat16 arithmetic": check_arithmetic,
    "bfloat16 reductions": check_reductions,
    "bfloat16 dot": lambda: check_dot(torch.bfloat16),
    "e4m3 dot": lambda: check_dot(torch.float8_e4m3fn),
    "bfloat16 constants": check_constants,
}
CHECKS = {**WRONG, "float32 fma": check_fma, "extremes with NaN": check_extremes_with_nan}


@pytest.mark.parametrize("name", CHECKS)
def test_corrected(name):
    CHECKS[name]()


def failing() -> list[str]:
    """Names of the checks that fail with the interpreter uncorrected."""
    torch.manual_seed(0)
    found = []
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            found.append(name)
    return found


def in_new_process(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**clean, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_correction_is_still_needed():
    """If this fails, a new Triton does by itself what is corrected here: drop the correction for it."""
    code = "import json, test_interpreter as t; print(json.dumps(t.failing()))"
    assert set(WRONG) <= set(json.loads(in_new_process(code, TRITON_INTERPRET="1")))


def test_triton_may_have_been_imported_before_without_interpreting():
    """transformers and torch.compile import it, and then `tl.max` is not a function of the interpreter."""
    code = """
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
import test_interpreter as t
with t.corrected_interpreter():
    print(t.failing())
"""
    assert in_new_process(code).strip() == "[]"


def test_corrections_are_taken_back():
    from triton.runtime import interpreter

    corrected = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    with corrected_interpreter():
        assert interpreter._convert_float is not corrected[0]
        assert interpreter.InterpreterBuilder.create_dot is not corrected[1]
    assert (interpreter._convert_float, interpreter.InterpreterBuilder.create_dot) == corrected


@pytest.mark.parametrize("change", ["renamed", "another parameter"])
def test_other_internals_are_refused(monkeypatch, change):
    from triton.runtime.interpreter import InterpreterBuilder

    if change == "renamed":
        monkeypatch.delattr(InterpreterBuilder, "create_dot")
    else:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, d, precision: None)
    with pytest.raises(InterpreterChangedError, match=r"create_dot with parameters .* got .* in Triton"):
        corrected_interpreter().__enter__()


def test_bitwise_comparison_sees_every_bit():
    zeros = torch.zeros(3, 4)
    assert_bitwise(zeros, zeros.clone())
    for other, message in (
        (-zeros, r"12 of 12 elements differ, the first at \[0, 0\]: expected -0.0, got 0.0"),
        (zeros.half(), "expected torch.float16, got torch.float32"),
        (torch.zeros(4, 3), r"expected \[4, 3\], got \[3, 4\]"),
        (torch.zeros(4, 3).T, r"expected strides \(1, 3\), got \(4, 1\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_bitwise(zeros, other)
    assert_bitwise(zeros, torch.zeros(4, 3).T, strides=False)
