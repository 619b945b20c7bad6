"""Products of float32 by oneDNN: values and derivatives of every order, strides, and what gets the built-in product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deepseek_kernels import dense_gemm, grouped_gemm, linear_cross_entropy
from deepseek_kernels.common import float32_products
from deepseek_kernels.common.float32_products import by_onednn, product, use_onednn

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a build without oneDNN"
)

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def onednn():
    """On this machine, whatever its processor is, and at every size of at least two rows."""
    with pytest.MonkeyPatch.context() as patch, use_onednn(True):
        patch.setattr(float32_products, "_LEAST_PRODUCTS", 1)
        yield


def close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Compares with the product in float64: each of K additions rounds a sum of at most |x| @ |weight|."""
    x, weight = x.detach().double(), weight.detach().double()
    allowed = (x.shape[-1] + 1) * EPS * (x.abs() @ weight.abs().T)
    return bool(((got.detach().double() - x @ weight.T).abs() <= allowed).all())


@pytest.mark.parametrize(("rows", "outputs", "depth"), [(2, 1, 1), (3, 5, 7), (17, 33, 65), (64, 128, 96), (5, 300, 1)])
def test_products_and_gradients_are_those_of_float64(rows, outputs, depth):
    x, weight = torch.randn(rows, depth, requires_grad=True), torch.randn(outputs, depth, requires_grad=True)
    assert by_onednn(x, weight)
    out = product(x, weight)
    assert out.is_contiguous()
    assert close(out, x, weight)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert close(x.grad, grad, weight.T)
    assert close(weight.grad, grad.T, x.T)
    with torch.no_grad():
        assert torch.equal(product(x, weight), out)


def test_any_strides_and_leading_dimensions():
    x, weight = torch.randn(4, 3, 20)[:, :, ::2], torch.randn(10, 6).T
    assert close(product(x, weight).flatten(0, 1), x.flatten(0, 1), weight)
    expanded = torch.randn(1, 10).expand(4, -1)
    assert close(product(expanded, weight), expanded, weight)
    column = torch.randn(6, 1).expand(-1, 10)
    assert close(product(column, weight), column, weight)


def test_the_gradient_of_a_sum_is_expanded_and_right():
    x, weight = torch.randn(4, 10, requires_grad=True), torch.randn(6, 10)
    product(x, weight).sum().backward()
    assert close(x.grad, torch.ones(4, 6), weight.T)


def test_derivatives_of_every_order():
    """Numeric differences of float64 do not run on oneDNN, so the second derivative is compared with the built-in's."""
    values = {}
    for wanted in (True, False):
        with use_onednn(wanted):
            torch.manual_seed(0)
            x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
            grads = torch.autograd.grad(product(x, weight).square().sum(), (x, weight), create_graph=True)
            values[wanted] = torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight))
    for ours, expected in zip(values[True], values[False], strict=True):
        torch.testing.assert_close(ours, expected, rtol=100 * EPS, atol=100 * EPS * float(expected.abs().max()))


def test_only_the_gradients_that_are_needed_are_computed():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    product(x, weight).backward(torch.ones(4, 6))
    assert x.grad is not None
    assert weight.grad is None


def test_not_a_number_reaches_its_own_row_only():
    x, weight = torch.randn(5, 32), torch.randn(9, 32)
    x[2, 3] = float("nan")
    x[3, 4] = float("inf")
    out = product(x, weight)
    assert out[2].isnan().all()
    assert not out[3].isfinite().any()
    assert out[[0, 1, 4]].isfinite().all()


def test_rows_do_not_depend_on_the_run():
    x, weight = torch.randn(70, 96), torch.randn(50, 96)
    assert torch.equal(product(x, weight), product(x, weight))


def test_what_traces_or_transforms_gets_the_built_in_product():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    batched = torch.vmap(product, in_dims=(0, None))(torch.randn(3, 4, 8), weight)
    assert batched.shape == (3, 4, 6)
    _, tangent = torch.func.jvp(lambda value: product(value, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), weight))
    graph = torch.fx.experimental.proxy_tensor.make_fx(product)(x, weight)
    assert not any("mkldnn" in str(node.target) for node in graph.graph.nodes)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(x, weight)
    with use_onednn(False):
        assert not by_onednn(x, weight)
    assert by_onednn(x, weight)
    assert not by_onednn(x[:1], weight)
    assert not by_onednn(x.bfloat16(), weight.bfloat16())
    assert not by_onednn(x.to("meta"), weight.to("meta"))
    with pytest.raises(RuntimeError):
        product(x, torch.randn(6, 9))


def test_small_products_stay_with_the_built_in(monkeypatch):
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float32_products, "_LEAST_PRODUCTS", 1 << 21)
        assert not by_onednn(torch.randn(16, 128), torch.randn(128, 128))
        assert by_onednn(torch.randn(128, 128), torch.randn(128, 128))


@pytest.mark.parametrize("operator", ["dense_gemm", "grouped_gemm", "linear_cross_entropy"])
def test_operators_give_the_built_in_products_to_rounding(operator):
    """Sums of 40 terms in another order; the gradient of the loss has fewer, smaller ones."""
    x, targets = torch.randn(24, 40), torch.randint(30, (24,))
    weight, ends = torch.randn(3, 30, 40) / 40**0.5, torch.tensor([10, 10, 22])

    def run() -> list[torch.Tensor]:
        own, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if operator == "dense_gemm":
            out = dense_gemm(own, w[0])
        elif operator == "grouped_gemm":
            out = grouped_gemm(own, w, ends)
        else:
            out = linear_cross_entropy(own, w[0], targets).loss
        out.backward(torch.ones_like(out))
        return [out.detach(), own.grad, w.grad]

    got = run()
    with use_onednn(False):
        expected = run()
    for ours, other in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=40 * EPS * float(other.abs().max()))


def test_float16_is_expanded_where_the_processor_has_no_products_of_it():
    from deepseek_kernels import dispatch

    native = dispatch.native_half_matmul.__wrapped__
    supported = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert native(torch.float16) == (supported and native(torch.bfloat16))
    with dispatch.use_native_half_matmul(True):
        assert native(torch.float16)
        assert native()
    with dispatch.use_native_half_matmul(False):
        assert not native(torch.float16)
        assert not native()
