"""The GPU checks on a CPU: each passes on the references, and fails on the fault that it is for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import deepseek_kernels
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import exact_products, large_offsets
from benchmarks.gpu.checks import checks, repeats
from benchmarks.gpu.sizes import FULL, SMALL, Skipped
from benchmarks.operators.declare import operators, select
from benchmarks.operators.scales import scale
from benchmarks.operators.verify import Mismatch
from deepseek_kernels.common.fp8 import decode

CPU = torch.device("cpu")
ALL = checks(SMALL)


@pytest.mark.parametrize("name", ALL)
def test_the_references_pass(name):
    ALL[name](CPU, SMALL)


def test_every_operator_is_repeated():
    for sizes in (SMALL, FULL):
        repeated = [name for name in checks(sizes) if name.startswith("repeats: ")]
        assert len(repeated) == len(operators())


def test_full_sizes_are_beyond_int32():
    most = 2**31
    assert FULL.rows * FULL.width > most
    assert FULL.experts * FULL.expert * FULL.width > most
    assert FULL.tokens * FULL.topk * FULL.width > most
    assert FULL.rows % 128 == 0  # the last rows are groups of their own
    assert FULL.long == 16384


# ------------------------------------------------------------------ the faults that they are for


def off_by_one_bit(function, part=lambda result: result):
    """Returns `function` with a change in the last element of its result."""

    def wrong(*inputs, **options):
        result = function(*inputs, **options)
        last = part(result)
        with torch.no_grad():
            last[(-1,) * last.ndim] += 1e-3 + last[(-1,) * last.ndim].abs() * 1e-2
        return result

    return wrong


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("integers: fp8_gemm", "fp8_gemm"),
        ("integers: grouped products", "fp8_grouped_gemm"),
        ("integers: grouped products", "grouped_gemm"),
        ("integers: grouped gradients", "fp8_grouped_wgrad"),
        ("beyond 2^31: fp8_gemm", "fp8_gemm"),
        ("beyond 2^31: experts", "fp8_grouped_gemm"),
        ("beyond 2^31: experts", "grouped_gemm"),
        ("beyond 2^31: experts", "fp8_grouped_wgrad"),
        ("beyond 2^31: permutation", "permute"),
    ],
)
def test_a_wrong_product_is_found(monkeypatch, name, function):
    def last(result):
        # The last row that belongs to an expert: the rows after it are zeros.
        return result[:-1] if name == "integers: grouped products" else result

    module = large_offsets if name.startswith("beyond") else exact_products
    monkeypatch.setattr(module, function, off_by_one_bit(getattr(deepseek_kernels, function), last))
    with pytest.raises(Mismatch):
        ALL[name](CPU, SMALL)


@pytest.mark.parametrize("function", ["quantize_rows", "quantize_transposed", "quantize_both", "quantize_blocks"])
@pytest.mark.parametrize("place", [0, 1], ids=["codes", "scales"])
def test_a_wrong_quantization_of_the_last_rows_is_found(monkeypatch, function, place):
    right = getattr(deepseek_kernels, function)

    def wrong(x):
        result = right(x)
        if x.shape[0] > 128:  # not the expected one
            one = result[place].view(torch.uint8) if place == 0 else result[place]
            one[-1, -1] += 1
        return result

    monkeypatch.setattr(large_offsets, function, wrong)
    with pytest.raises(Mismatch, match=function):
        ALL["beyond 2^31: quantization"](CPU, SMALL)


def test_sums_without_promotion_are_found(monkeypatch):
    """A product that adds 32 terms at a time to a sum of 14 bits, truncated, as the FP8 units do without promotion."""

    def truncated(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp(torch.trunc(mantissa * 2**14) / 2**14, exponent)

    def unpromoted(a, a_scale, b, b_scale, dtype):
        total = torch.zeros(a.shape[0], b.shape[0])
        wide = decode(a), decode(b)
        for start in range(0, a.shape[1], 32):
            total = truncated(total + wide[0][:, start : start + 32] @ wide[1][:, start : start + 32].T)
        return total

    def with_scales_of_one(x):
        return x.to(torch.float8_e4m3fn), torch.ones(x.shape[0], x.shape[1] // 128)

    monkeypatch.setattr(exact_products, "quantize_rows", with_scales_of_one)
    exact_products.promotion(CPU, SMALL)  # the reference promotes
    monkeypatch.setattr(exact_products, "fp8_gemm", unpromoted)
    with pytest.raises(Mismatch, match="sums of 16384 terms"):
        exact_products.promotion(CPU, FULL)


def test_a_race_is_found(monkeypatch):
    (operator,) = select(["moe_permute.permute"])
    (shape,) = operator.shapes(scale("tiny"))
    turns = itertools.count()
    right = operator.ours

    def racing(*inputs):
        return right(*inputs) + (1.0 if next(turns) == 13 else 0.0)

    monkeypatch.setattr(operator, "ours", racing, raising=False)
    with pytest.raises(Mismatch, match="repetition 13 of 19"):
        repeats(operator, shape, CPU)


def test_unwritten_memory_is_poisoned():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        memory = torch.zeros(3, dtype=dtype)
        gpu_checks._poison(memory)
        assert all(math.isnan(value) for value in memory.float().tolist())
    memory = torch.zeros(3, dtype=torch.int64)
    gpu_checks._poison(memory)
    assert memory.tolist() == [-1, -1, -1]


def test_a_check_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    with pytest.raises(Skipped, match="needs 24 GiB of memory, 1 are free"):
        large_offsets.require_memory(torch.device("cuda"), 16 * 2**30)
    large_offsets.require_memory(torch.device("cuda"), 2**28)
