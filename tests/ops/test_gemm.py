"""dense_gemm and grouped_gemm against plain products in float64, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_kernels import dense_gemm, grouped_gemm

HALF = [torch.bfloat16, torch.float16]


def error_bound(dtype: torch.dtype, depth: int, exact: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """One rounding of the result, plus float32 accumulation over `depth` terms of total size `terms`."""
    return torch.finfo(dtype).eps * exact.abs() + depth * torch.finfo(torch.float32).eps * terms


def assert_product(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = error_bound(got.dtype, a.shape[-1], exact, terms) + torch.finfo(got.dtype).tiny
    worst = ((got.double() - exact).abs() - bound).max()
    assert worst <= 0, f"exceeds the bound by {worst:.3g}"


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [
        (1, 40, 24),  # a matrix-vector product
        (16, 33, 7),  # the first size that is expanded; odd sizes
        (50, 64, 1030),  # more than two blocks of weight rows, the last one partial
    ],
)
def test_dense_gemm_and_gradients(native, dtype, rows, width, out):
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, width, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, out, dtype=dtype)
    y = dense_gemm(x, weight)
    y.backward(grad)
    assert_product(y, x.detach(), weight.detach().T)
    assert_product(x.grad, grad, weight.detach())
    assert_product(weight.grad, grad.T, x.detach())


def test_dense_gemm_keeps_leading_dimensions_and_non_contiguous_input(native):
    x = torch.randn(5, 8, 32, dtype=torch.bfloat16).transpose(0, 1)
    weight = torch.randn(32, 12, dtype=torch.bfloat16).T
    assert dense_gemm(x, weight).shape == (8, 5, 12)
    assert_product(dense_gemm(x, weight).flatten(0, 1), x.flatten(0, 1), weight.T)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "counts",
    [
        [3, 0, 20, 1],  # an expert without rows; one on each side of the expansion threshold
        [0, 0, 0, 24],  # all tokens to one expert
        [0, 0, 0, 0],  # no token at all
    ],
)
def test_grouped_gemm_and_gradients(native, dtype, counts):
    rows, experts = sum(counts), len(counts)
    x = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(experts, 10, 24, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, 10, dtype=dtype)
    y = grouped_gemm(x, weight, torch.tensor(counts).cumsum(0))
    y.backward(grad)
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start := start + count)
        if not count:
            assert torch.equal(weight.grad[expert], torch.zeros_like(weight[expert]))  # TRAPS C15
            continue
        assert_product(y[part], x.detach()[part], weight.detach()[expert].T)
        assert_product(x.grad[part], grad[part], weight.detach()[expert])
        assert_product(weight.grad[expert], grad[part].T, x.detach()[part])


def test_grouped_gemm_rows_of_nobody_are_zeros(native):
    x = torch.full((6, 8), float("nan"))
    x[:4] = 1
    y = grouped_gemm(x, torch.ones(2, 3, 8), torch.tensor([1, 4]))
    assert torch.equal(y, torch.tensor([[8.0] * 3] * 4 + [[0.0] * 3] * 2))


def test_grouped_gemm_reads_no_unused_expert():
    weight = torch.full((3, 4, 8), float("nan"))
    weight[1] = 1
    assert torch.equal(grouped_gemm(torch.ones(2, 8), weight, torch.tensor([0, 2, 2])), torch.full((2, 4), 8.0))


def test_products_follow_autocast(native):
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(2, 6, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_gemm(x, weight, torch.tensor([17, 20]))
        z = dense_gemm(x, weight[0])
    assert y.dtype == z.dtype == torch.bfloat16
    (y.sum() + z.sum()).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


class _Products(TorchDispatchMode):
    """Notes the dtypes of the matrices that are really multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_expanded_products_stay_expanded_under_autocast():
    """Autocast reaches into custom operators: it would undo the expansion, and make it pay for nothing."""
    from deepseek_kernels.common import half_products

    x, weight, grad = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((20, 16), (6, 16), (20, 6)))
    with torch.autocast("cpu", dtype=torch.bfloat16), _Products() as seen:
        half_products.multiply(x, weight)
        half_products.input_gradient(grad, weight)
        half_products.weight_gradient(grad, x, torch.empty_like(weight))
    assert seen.dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("x", "weight", "ends", "words"),
    [
        ((4, 8), (2, 3, 9), (2,), r"\[P, 9\]"),
        ((4, 8), (2, 3, 8), (3,), r"ends \[2\]"),
        ((4, 2, 8), (2, 3, 8), (2,), r"x \[P, K\]"),
    ],
)
def test_grouped_gemm_names_what_does_not_fit(x, weight, ends, words):
    with pytest.raises(ValueError, match=words):
        grouped_gemm(torch.ones(x), torch.ones(weight), torch.ones(ends, dtype=torch.int64))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_dense_gemm_any_shape(rows, width, out, seed):
    from deepseek_kernels.common.half_products import multiply

    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=random).bfloat16()
    weight = torch.randn(out, width, generator=random).bfloat16()
    got = multiply(x, weight)
    assert got.shape == (rows, out) and got.dtype == torch.bfloat16
    if rows:
        assert_product(got, x, weight.T)


def test_operators_are_registered_correctly():
    """Schema, fake and autograd registrations agree with what the operators do."""
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(2, 6, 8, requires_grad=True)
    ends = torch.tensor([7, 20])
    torch.library.opcheck(torch.ops.deepseek_kernels.grouped_gemm.default, (x, weight, ends))
    half = (x.detach().bfloat16().requires_grad_(), weight[0].detach().bfloat16().requires_grad_())
    torch.library.opcheck(torch.ops.deepseek_kernels.dense_gemm_expanded.default, half)
