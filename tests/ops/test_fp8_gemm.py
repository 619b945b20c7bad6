"""FP8 products: the reference against float64 sums, the kernels against integers that leave no room for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, fp8_gemm, quantize_blocks, quantize_both, quantize_rows, use_backend
from deepseek_kernels.gemm.fp8_gemm import reference, transposed
from deepseek_kernels.testing.numeric import assert_bitwise
from support.fp8_products import (
    assert_product,
    b_groups,
    cdiv,
    dequantized,
    exact,
    integer_operands,
    on,
    random_codes,
    random_operands,
)

# The reference against the definition.


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 1),
        (3, 128, 128),
        (131, 149, 389),
        (2, 576, 896),  # the ratio of V3's kv_a_proj, 576 x 7168: four blocks and a half
        (5, 192, 256),
        (4, 1100, 176),  # several bands; half a group at the end, as V2-Lite's 10944 = 85.5 x 128
    ],
)
def test_reference_is_the_dequantized_product(m, n, k, by_rows):
    operands = random_operands(m, n, k, by_rows)
    a, b = dequantized(*operands[:2]), dequantized(*operands[2:])
    with use_backend("reference"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert_product(fp8_gemm(*operands, dtype), a, b)


def test_all_codes_multiply(device):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    one = torch.ones(128, 1)
    got = fp8_gemm(*on(device, (torch.eye(128).to(codes.dtype), one, codes, torch.ones(1, 1))), torch.float32)
    values = dequantized(codes, torch.ones(2, 1))
    # A NaN makes its whole column one.
    expected = values.float().T.masked_fill(values.isnan().any(1), torch.nan)
    assert torch.equal(got.cpu().nan_to_num(), expected.nan_to_num())


def test_reference_never_holds_more_than_a_band_of_the_weight(monkeypatch):
    seen = []

    def recording(codes: Tensor) -> Tensor:
        seen.append(codes.shape[0])
        return codes.float()

    monkeypatch.setattr(reference, "decode", recording)
    with use_backend("reference"):
        fp8_gemm(*random_operands(7, 1300, 130, False))
    assert seen == [7, reference.BAND, reference.BAND, 1300 - 2 * reference.BAND]


def test_autocast_does_not_round_the_reference(monkeypatch):
    operands = integer_operands(3, 200, 300, False)
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        got = fp8_gemm(*operands, torch.float32)
    assert torch.equal(got.double(), exact(*operands))


# The three products of a linear layer, both implementations alike.


def test_forward_and_both_gradients_of_a_layer(backend, device):
    x, w, dy = (torch.randn(shape, device=device) for shape in ((37, 150), (260, 150), (37, 260)))
    with use_backend("reference"):
        weight, weight_scale = quantize_blocks(w)
        rows, rows_scale, columns, columns_scale = quantize_both(x)
        grad, grad_scale, grad_t, grad_t_scale = quantize_both(dy)
    w64, dy64 = dequantized(weight, weight_scale), dequantized(grad, grad_scale)

    y = fp8_gemm(rows, rows_scale, weight, weight_scale, torch.float32)
    assert_product(y, dequantized(rows, rows_scale), w64)

    dx = fp8_gemm(grad, grad_scale, transposed(weight), weight_scale.T, torch.float32)
    assert_product(dx, dy64, w64.T)

    dw = fp8_gemm(grad_t, grad_t_scale, columns, columns_scale, torch.float32)
    assert_product(dw, dequantized(grad_t, grad_t_scale), dequantized(columns, columns_scale))

    # End to end: of the three bits of mantissa a rounding takes half a step, and errors are independent.
    for got, full in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        signal_to_noise = 20 * torch.log10(full.norm() / (got - full).norm())
        assert signal_to_noise > 25


def test_transposed_codes_are_the_same_bytes(device):
    codes = random_codes(37, 130).to(device)
    got = transposed(codes)
    assert got.shape == (130, 37) and got.stride() == (48, 1)
    assert torch.equal(got.view(torch.uint8), codes.view(torch.uint8).T)


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_nan_stays_in_its_row_or_column(backend, device, by_rows):
    a, a_scale, b, b_scale = on(device, random_operands(70, 140, 300, by_rows))
    clean = fp8_gemm(a, a_scale, b, b_scale)
    a.view(torch.uint8)[3, 299], b.view(torch.uint8)[130, 5] = 0x7F, 0xFF
    got = fp8_gemm(a, a_scale, b, b_scale)
    spoilt = torch.zeros(70, 140, dtype=torch.bool, device=device)
    spoilt[3] = spoilt[:, 130] = True
    assert torch.equal(got.isnan(), spoilt)
    assert torch.equal(got[~spoilt], clean[~spoilt])


def test_an_overflow_passes_through_the_quantizer_as_nan(backend, device):
    x = torch.ones(2, 256, device=device)
    x[1, 200] = torch.inf
    with use_backend("reference"):
        operands = *quantize_rows(x), *quantize_blocks(torch.ones(3, 256, device=device))
    got = fp8_gemm(*operands)
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_zeros_give_zeros(backend, device):
    x, w = torch.zeros(5, 200, device=device), torch.randn(130, 200, device=device)
    with use_backend("reference"):
        rows, blocks = (quantize_rows(x), quantize_rows(w)), (quantize_blocks(x), quantize_blocks(w))
    assert not fp8_gemm(*rows[0], *blocks[1]).any() and not fp8_gemm(*rows[1], *blocks[0]).any()


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 128), (5, 0, 128), (5, 4, 0), (0, 0, 0)])
def test_nothing_in_zeros_out(backend, device, m, n, k, by_rows):
    codes = torch.empty(0, device=device).to(torch.float8_e4m3fn)
    a, b = codes.new_empty(m, k), codes.new_empty(n, k)
    a_scale = torch.ones(m, cdiv(k, 128), device=device)
    got = fp8_gemm(a, a_scale, b, torch.ones(b_groups(n, k, by_rows), device=device), torch.float32)
    assert torch.equal(got, torch.zeros(m, n, device=device))


def test_other_layouts_of_the_operands_give_the_same(backend, device):
    a, a_scale, b, b_scale = on(device, integer_operands(20, 150, 260, False))
    expected = fp8_gemm(a, a_scale, b, b_scale)
    wide = torch.full((20, 600), 0x7F, dtype=torch.uint8, device=device)
    wide[:, 3:523:2] = a.view(torch.uint8)
    every_other = wide[:, 3:523:2].view(a.dtype)
    unaligned = torch.full((20, 270), 0x7F, dtype=torch.uint8, device=device)
    unaligned[:, 7:267] = a.view(torch.uint8)
    strided_scale = torch.stack([a_scale, a_scale], 2)[:, :, 0]
    for codes in (every_other, unaligned[:, 7:267].view(a.dtype), transposed(transposed(a)), transposed(a).T):
        assert_bitwise(fp8_gemm(codes, strided_scale, b, b_scale), expected)
        assert_bitwise(fp8_gemm(b, b_scale.repeat_interleave(128, 0)[:150], codes, a_scale).T.contiguous(), expected)
    row = fp8_gemm(a[:1].expand(20, 260), a_scale[:1].expand(20, 3), b, b_scale)
    assert torch.equal(row, expected[:1].expand(20, 150))


def test_results_carry_no_gradient(backend, device):
    a, a_scale, b, b_scale = on(device, random_operands(3, 5, 130, False))
    assert not fp8_gemm(a, a_scale.requires_grad_(), b, b_scale.requires_grad_()).requires_grad


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    operands = on(device, integer_operands(5, 200, 260, False))

    def step(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
        return fp8_gemm(a, a_scale * 2, b, b_scale, torch.float32) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*operands), step(*operands))


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.gemm.fp8_gemm import launch

    operands = on(device, random_operands(5, 200, 130, False))
    for operator in (launch.multiply, reference.multiply):
        torch.library.opcheck(operator, (*operands, torch.float16), test_utils="test_faketensor")


# What users do wrong.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(4, 128)}, r"a \[M, K\] float8_e4m3fn, got torch.float32 \[4, 128\]"),
        ({"b": random_codes(3, 130)[0]}, r"b \[N, 130\] float8_e4m3fn, got torch.float8_e4m3fn \[130\]"),
        ({"b": random_codes(3, 129)}, r"expected b \[N, 130\] beside a \[4, 130\], got \[3, 129\]"),
        ({"a_scale": torch.ones(4, 1)}, r"a_scale \[4, 2\] float32, got torch.float32 \[4, 1\]"),
        ({"a_scale": torch.ones(4, 2).double()}, r"a_scale \[4, 2\] float32, got torch.float64 \[4, 2\]"),
        ({"b_scale": torch.ones(2, 2)}, r"b_scale \[1, 2\] or \[3, 2\] float32, got torch.float32 \[2, 2\]"),
        ({"dtype": torch.float64}, r"dtype float32, bfloat16 or float16, got torch.float64"),
        ({"b_scale": torch.ones(1, 2, device="meta")}, r"all operands on one device, got cpu, cpu, cpu, meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"a": random_codes(4, 130), "a_scale": torch.ones(4, 2)}
    good |= {"b": random_codes(3, 130), "b_scale": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=message):
        fp8_gemm(**(good | change))


def test_transposing_what_is_not_codes():
    with pytest.raises(ValueError, match=r"codes \[R, C\] float8_e4m3fn, got torch.uint8 \[2, 2\]"):
        transposed(torch.zeros(2, 2, dtype=torch.uint8))


def test_amd_gpus_run_the_reference(triton_backend, monkeypatch):
    """Theirs is another e4m3: products would be emulated."""
    operands = integer_operands(3, 5, 130, False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert torch.equal(fp8_gemm(*operands, torch.float32).double(), exact(*operands))
    with use_backend("triton"), pytest.raises(BackendError, match="the FP8 of NVIDIA GPUs"):
        fp8_gemm(*operands)
