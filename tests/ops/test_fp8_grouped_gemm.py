"""Grouped FP8 products: the reference against float64 sums expert by expert, the kernels against exact integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import (
    fp8_grouped_gemm,
    fp8_grouped_wgrad,
    quantize_blocks,
    quantize_grouped_transposed,
    quantize_rows,
    use_backend,
)
from deepseek_kernels.gemm.fp8_gemm.configs import FEW, PLAIN, PLAIN_ROWS, SPECIALIZED, Config
from deepseek_kernels.gemm.fp8_grouped_gemm import reference
from deepseek_kernels.gemm.fp8_grouped_gemm.configs import gradient_config, product_config
from deepseek_kernels.testing.numeric import assert_bitwise
from support.fp8_products import (
    assert_product,
    cdiv,
    dequantized,
    ends_of,
    grouped_operands,
    on,
    random_codes,
    random_scale,
    spans,
    transposed_operands,
)

PRODUCTS = {"specialized": SPECIALIZED, "plain": PLAIN, **{f"{config.columns} tokens": config for config in FEW}}
GRADIENTS = {"specialized": SPECIALIZED, "plain": PLAIN_ROWS}
few_examples = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Rows of each expert, then unassigned ones.
SHARES = {
    "one token": ([0, 0, 1, 0], 0),
    "all to one expert": ([0, 140, 0], 0),
    "one expert": ([33], 0),
    "unassigned rows at the end": ([5, 0, 19], 7),
    "only unassigned rows": ([0, 0], 20),
    "across tiles": ([3, 130, 0, 70], 66),
}


def assert_grouped(got: Tensor, x, x_scale, weight, weight_scale, ends, parts: int, exact: bool = False) -> None:
    for expert, start, end in spans(ends):
        rows = dequantized(x[start:end], x_scale[start:end]), dequantized(weight[expert], weight_scale[expert], parts)
        if exact:
            assert torch.equal(got[start:end].cpu().double(), rows[0] @ rows[1].T)
        else:
            assert_product(got[start:end], *rows)
    assert not got[int(ends[-1]) :].any()


def force(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    from deepseek_kernels.gemm.fp8_grouped_gemm import launch

    if config.specialized and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("specialized kernels need Hopper")
    for name in ("product_config", "gradient_config"):
        monkeypatch.setattr(launch, name, lambda *sizes: config)


def assert_gradient(got: Tensor, grad, grad_scale, x, x_scale, ends, exact: bool = False) -> None:
    first = 0
    for expert, start, end in spans(ends):
        groups = slice(first, first + cdiv(end - start, 128))
        tokens = slice(128 * groups.start, 128 * groups.stop)
        left = dequantized(grad[:, tokens], grad_scale[:, groups])
        right = dequantized(x[:, tokens], x_scale[:, groups])
        if exact:
            assert torch.equal(got[expert].cpu().double(), left @ right.T)
        else:
            assert_product(got[expert], left, right)
        first = groups.stop
    assert got.shape == (len(ends), grad.shape[0], x.shape[0])


# The products.


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_each_experts_rows_times_its_weight(backend, device, share, parts):
    """Parts of 75 rows: not whole blocks, so that a block of the whole weight would span both."""
    given_operands = grouped_operands(*SHARES[share], 150, 200, parts)
    got = fp8_grouped_gemm(*on(device, given_operands), torch.float32, parts)
    assert_grouped(got, *given_operands, parts)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_configuration_is_exact_on_integers(triton_backend, monkeypatch, device, name):
    """Two row tiles of one expert, one of another; two parts of a block and a bit; two groups, the last partial."""
    config = PRODUCTS[name]
    force(monkeypatch, config)
    tokens = config.columns if config.swapped else config.rows
    given_operands = grouped_operands([tokens + 3, 0, 5], 3, 2 * 137, 148, 2, integers=True)
    with use_backend("triton"):
        got = fp8_grouped_gemm(*on(device, given_operands), torch.float32, 2)
        assert_grouped(got, *given_operands, 2, exact=True)
        assert_bitwise(fp8_grouped_gemm(*on(device, given_operands), torch.bfloat16, 2), got.bfloat16())


@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    unassigned=st.integers(0, 5),
    half=st.integers(1, 140),
    k=st.integers(1, 300),
    parts=st.sampled_from([1, 2]),
    name=st.sampled_from(list(PRODUCTS)),
    seed=st.integers(0, 2**32 - 1),
)
@few_examples
def test_any_share_in_any_configuration(triton_backend, device, counts, unassigned, half, k, parts, name, seed):
    torch.manual_seed(seed)
    given_operands = grouped_operands(counts, unassigned, 2 * half, k, parts)
    with pytest.MonkeyPatch.context() as monkeypatch, use_backend("triton"):
        force(monkeypatch, PRODUCTS[name])
        got = fp8_grouped_gemm(*on(device, given_operands), torch.float32, parts)
    assert_grouped(got, *given_operands, parts)


def test_input_gradient_is_the_product_with_transposed_codes(backend, device):
    given_operands = grouped_operands([20, 0, 13], 0, 256, 200, parts=2)
    _, _, weight, weight_scale, ends = given_operands
    grad, grad_scale = random_codes(33, 256), random_scale(33, 2)
    flipped = weight.view(torch.uint8).mT.contiguous().view(weight.dtype)
    got = fp8_grouped_gemm(*on(device, (grad, grad_scale, flipped, weight_scale.mT, ends)), torch.float32)
    for expert, start, end in spans(ends):
        full = dequantized(weight[expert], weight_scale[expert], 2)
        assert_product(got[start:end], dequantized(grad[start:end], grad_scale[start:end]), full.T)


def test_experts_without_rows_are_not_read(backend, device):
    x, x_scale, weight, weight_scale, ends = on(device, grouped_operands([4, 0, 9, 0], 0, 130, 200))
    clean = fp8_grouped_gemm(x, x_scale, weight, weight_scale, ends)
    weight.view(torch.uint8)[[1, 3]], weight_scale[[1, 3]] = 0x7F, torch.nan
    assert_bitwise(fp8_grouped_gemm(x, x_scale, weight, weight_scale, ends), clean)


def test_a_nan_stays_in_its_row(backend, device):
    x, x_scale, weight, weight_scale, ends = on(device, grouped_operands([70, 3], 0, 130, 200))
    clean = fp8_grouped_gemm(x, x_scale, weight, weight_scale, ends)
    x.view(torch.uint8)[69, 199] = 0xFF
    got = fp8_grouped_gemm(x, x_scale, weight, weight_scale, ends)
    assert got[69].isnan().all()
    others = torch.arange(73, device=device) != 69
    assert_bitwise(got[others], clean[others])


# The weights' gradient.


@pytest.mark.parametrize("share", SHARES)
def test_gradient_sums_over_each_experts_tokens(backend, device, share):
    counts, _ = SHARES[share]
    given_operands = transposed_operands(counts, 70, 40)
    assert_gradient(fp8_grouped_wgrad(*on(device, given_operands)), *given_operands)


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_gradient_configuration_is_exact_on_integers(triton_backend, monkeypatch, device, name):
    """The last expert has no tokens, and no column left that it could read: the operands end with the others'."""
    force(monkeypatch, GRADIENTS[name])
    given_operands = transposed_operands([130, 0, 5, 0], 131, 145, integers=True, columns=384)
    with use_backend("triton"):
        got = fp8_grouped_wgrad(*on(device, given_operands))
        assert_gradient(got, *given_operands, exact=True)
        assert_bitwise(fp8_grouped_wgrad(*on(device, given_operands), torch.bfloat16), got.bfloat16())


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    n=st.integers(1, 140),
    k=st.integers(1, 140),
    name=st.sampled_from(list(GRADIENTS)),
    seed=st.integers(0, 2**32 - 1),
)
@few_examples
def test_any_gradient(triton_backend, device, counts, n, k, name, seed):
    torch.manual_seed(seed)
    given_operands = transposed_operands(counts, n, k)
    with pytest.MonkeyPatch.context() as monkeypatch, use_backend("triton"):
        force(monkeypatch, GRADIENTS[name])
        got = fp8_grouped_wgrad(*on(device, given_operands))
    assert_gradient(got, *given_operands)


# A layer of experts, from high precision and back.


def test_forward_and_both_gradients_of_experts(backend, device):
    counts, n, k = [33, 0, 130, 1], 256, 144
    ends, rows = ends_of(counts), sum(counts) + 2
    x, w, dy = torch.randn(rows, k), torch.randn(4, n, k), torch.randn(rows, n)
    with use_backend("reference"):
        weight = [torch.stack(stack) for stack in zip(*(quantize_blocks(one) for one in w), strict=True)]
        forward, backward = (*quantize_rows(x), *weight), quantize_rows(dy)
        flipped = weight[0].view(torch.uint8).mT.contiguous().view(weight[0].dtype), weight[1].mT
        columns = *quantize_grouped_transposed(dy, ends), *quantize_grouped_transposed(x, ends)
    y = fp8_grouped_gemm(*on(device, (*forward, ends)), torch.float32).cpu()
    dx = fp8_grouped_gemm(*on(device, (*backward, *flipped, ends)), torch.float32).cpu()
    dw = fp8_grouped_wgrad(*on(device, (*columns, ends))).cpu()

    full = [torch.zeros_like(y), torch.zeros_like(dx), torch.zeros_like(dw)]
    for expert, start, end in spans(ends):
        full[0][start:end] = x[start:end] @ w[expert].T
        full[1][start:end] = dy[start:end] @ w[expert]
        full[2][expert] = dy[start:end].T @ x[start:end]
    # Of the three bits of mantissa a rounding takes half a step, and errors are independent: some 28 dB are left.
    for got, expected in zip((y, dx, dw), full, strict=True):
        assert 20 * torch.log10(expected.norm() / (got - expected).norm()) > 25
    assert not y[-2:].any() and not dx[-2:].any() and not dw[1].any()


@pytest.mark.parametrize(("rows", "experts", "n", "k"), [(0, 3, 5, 128), (4, 0, 5, 128), (4, 3, 0, 128), (4, 3, 5, 0)])
def test_nothing_in_zeros_out(backend, device, rows, experts, n, k):
    codes = torch.empty(0, device=device).to(torch.float8_e4m3fn)
    groups, ends = cdiv(k, 128), torch.arange(1, experts + 1, device=device).clamp(max=rows)
    x, weight = codes.new_empty(rows, k), codes.new_empty(experts, n, k)
    scales = [torch.ones(shape, device=device) for shape in ((rows, groups), (experts, cdiv(n, 128), groups))]
    got = fp8_grouped_gemm(x, scales[0], weight, scales[1], ends)
    assert got.shape == (rows, n) and not got.any()
    columns = cdiv(rows, 128) * 128
    scales = [torch.ones(size, columns // 128, device=device) for size in (n, k)]
    got = fp8_grouped_wgrad(codes.new_zeros(n, columns), scales[0], codes.new_zeros(k, columns), scales[1], ends)
    assert got.shape == (experts, n, k) and not got.any()


def test_results_carry_no_gradient(backend, device):
    x, x_scale, weight, weight_scale, ends = on(device, grouped_operands([3, 2], 0, 5, 130))
    assert not fp8_grouped_gemm(x, x_scale.requires_grad_(), weight, weight_scale, ends).requires_grad


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    forward = on(device, grouped_operands([3, 0, 9], 2, 140, 150, integers=True))
    gradient = on(device, transposed_operands([3, 0, 9], 20, 30, integers=True))

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fp8_grouped_gemm(*tensors[:5], torch.float32) + 1, fp8_grouped_wgrad(*tensors[5:]) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*forward, *gradient), step(*forward, *gradient), strict=True):
        assert_bitwise(got, expected)


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.gemm.fp8_grouped_gemm import launch

    forward = on(device, grouped_operands([3, 2], 0, 130, 140))
    gradient = on(device, transposed_operands([3, 2], 5, 7))
    for module in (launch, reference):
        torch.library.opcheck(module.multiply, (*forward, torch.float16, 2), test_utils="test_faketensor")
        torch.library.opcheck(module.weight_gradient, (*gradient, torch.float32), test_utils="test_faketensor")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRODUCTS)
def test_nothing_waits_for_the_device(triton_backend, monkeypatch, device, name):
    force(monkeypatch, PRODUCTS[name])
    forward = on(device, grouped_operands([3, 0, 9], 2, 140, 150))
    gradient = on(device, transposed_operands([3, 0, 9], 20, 30))
    with use_backend("triton"):
        expected = fp8_grouped_gemm(*forward), fp8_grouped_wgrad(*gradient)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                got = fp8_grouped_gemm(*forward), fp8_grouped_wgrad(*gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(got, expected, strict=True):
        assert_bitwise(one, other)


# Which configuration runs.

H200 = 132  # processors


@pytest.mark.parametrize(
    ("rows", "experts", "n", "config"),
    [
        (32768, 8, 4096, SPECIALIZED),  # 8 experts of V3
        (65536, 256, 4096, SPECIALIZED),  # a prompt of 8192 tokens, all experts here: 256 rows each, in the mean
        (16384, 256, 4096, FEW[2]),
        (20000, 256, 4096, PLAIN),
        (512, 256, 4096, FEW[0]),  # decoding 64 tokens
        (8, 256, 4096, FEW[0]),  # decoding one
        (256, 1, 4096, PLAIN),  # too few tiles for the processors
    ],
)
def test_configuration_of_published_shapes(rows, experts, n, config):
    assert product_config(rows, experts, n // 128, True, H200) == config
    assert product_config(rows, experts, n // 128, False, H200) == (PLAIN if config.specialized else config)


def test_gradient_configuration():
    assert gradient_config(32768 + 8 * 128, 8, True) == SPECIALIZED
    assert gradient_config(16384, 256, True) == gradient_config(32768, 8, False) == PLAIN_ROWS


# What users do wrong.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 130)}, r"x \[P, K\] float8_e4m3fn, got torch.float32 \[4, 130\]"),
        ({"weight": random_codes(6, 130)}, r"weight \[E, N, 130\] float8_e4m3fn, got .* \[6, 130\]"),
        ({"weight": random_codes(6, 65).view(1, 6, 65)}, r"weight \[E, N, 130\] beside x \[4, 130\], got \[1, 6, 65\]"),
        ({"parts": 4}, r"parts that divides 6 rows, got 4"),
        ({"parts": 0}, r"parts that divides 6 rows, got 0"),
        ({"x_scale": torch.ones(2, 4)}, r"x_scale \[4, 2\] float32, got torch.float32 \[2, 4\]"),
        ({"parts": 2}, r"weight_scale \[1, 2, 2\] float32, got torch.float32 \[1, 1, 2\]"),
        ({"ends": torch.tensor([4, 4])}, r"ends \[1\] int64, got torch.int64 \[2\]"),
        ({"ends": torch.tensor([4], dtype=torch.int32)}, r"ends \[1\] int64, got torch.int32 \[1\]"),
        ({"dtype": torch.int8}, r"dtype float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"x": random_codes(4, 130), "x_scale": torch.ones(4, 2), "weight": random_codes(6, 130)[None]}
    good |= {"weight_scale": torch.ones(1, 1, 2), "ends": torch.tensor([4])}
    with pytest.raises(ValueError, match=message):
        fp8_grouped_gemm(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_t": torch.zeros(4, 128)}, r"x_t \[K, P'\] float8_e4m3fn, got torch.float32 \[4, 128\]"),
        ({"x_t": random_codes(4, 256)}, r"a multiple of 128, got 128 and 256"),
        ({"grad_t": random_codes(3, 130), "x_t": random_codes(4, 130)}, r"a multiple of 128, got 130 and 130"),
        ({"grad_scale": torch.ones(1, 3)}, r"grad_scale \[3, 1\] float32, got torch.float32 \[1, 3\]"),
        ({"x_scale": torch.ones(4, 1).half()}, r"x_scale \[4, 1\] float32, got torch.float16 \[4, 1\]"),
        ({"ends": torch.ones(1)}, r"ends \[E\] int64, got torch.float32 \[1\]"),
        ({"dtype": torch.float64}, r"dtype float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_wrong_arguments_of_the_gradient_are_named(change, message):
    good = {"grad_t": random_codes(3, 128), "grad_scale": torch.ones(3, 1), "x_t": random_codes(4, 128)}
    good |= {"x_scale": torch.ones(4, 1), "ends": torch.tensor([4])}
    with pytest.raises(ValueError, match=message):
        fp8_grouped_wgrad(**(good | change))
