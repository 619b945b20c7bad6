"""RMS norm with quantization: bit by bit what `quantize_rows` makes of the norm of the same backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, quantize_rows, use_backend
from deepseek_kernels.norm.rms_norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from deepseek_kernels.testing.numeric import assert_bitwise
from support.fp8_definition import FORMATS, assert_all_bitwise, matrix, on_reference, on_triton

# numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice")

EPS = 1e-6
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),  # the norm is float32
    (torch.float32, torch.float32),
    (torch.float16, torch.bfloat16),  # the norm is float32
]


def operands(rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype, device) -> tuple[Tensor, ...]:
    x, residual = matrix(rows, columns), matrix(rows, columns)
    return x.to(device, dtype), residual.to(device, dtype), torch.randn(columns).to(device, weight_dtype)


def check(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale_format: str | None) -> None:
    """Both operators, with the strides of `quantize_rows`."""
    expected, total = add_rms_norm(x, residual, weight, eps)
    flat = expected.reshape(-1, x.shape[-1])
    got = add_rms_norm_quantize(x, residual, weight, eps, scale_format)
    assert_all_bitwise(got, (*quantize_rows(flat, scale_format), total))
    flat = rms_norm(x, weight, eps).reshape(-1, x.shape[-1])
    assert_all_bitwise(rms_norm_quantize(x, weight, eps, scale_format), quantize_rows(flat, scale_format))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 128), (5, 300)])
def test_quantizes_the_norm_bit_by_bit(backend, device, rows, columns, dtype, weight_dtype, scale_format):
    check(*operands(rows, columns, dtype, weight_dtype, device), EPS, scale_format)


@pytest.mark.parametrize("enough", [0, math.inf], ids=["many rows to a program", "one row to a program"])
@pytest.mark.parametrize(("rows", "columns"), [(19, 130), (5, 1100), (2, 4100)])
def test_either_tile_quantizes_the_norm_bit_by_bit(triton_backend, device, monkeypatch, enough, rows, columns):
    """The norm itself always with the tile that it would choose: no tile has a sum of its own."""
    from deepseek_kernels.norm.rms_norm import configs

    x, residual, weight = operands(rows, columns, torch.bfloat16, torch.bfloat16, device)
    expected, total = on_triton(add_rms_norm, x, residual, weight, EPS)
    monkeypatch.setattr(configs, "ENOUGH_PROGRAMS", enough)
    got = on_triton(add_rms_norm_quantize, x, residual, weight, EPS)
    assert_all_bitwise(got, (*on_reference(quantize_rows, expected), total))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_what_is_not_finite_and_what_is_zero(backend, device, scale_format):
    """A NaN in x is its row's; an infinity leaves zeros in other groups; zeros have the least scale (TRAPS E4)."""
    x = torch.randn(5, 300, device=device).bfloat16()
    x[0, 3], x[1, 140], x[2] = math.nan, math.inf, 0
    weight = torch.ones(300, device=device).bfloat16()
    codes, scales = rms_norm_quantize(x, weight, EPS, scale_format)
    bits = codes.view(torch.uint8)
    assert (bits[0] == 0x7F).all()
    assert bits[1, 140] == 0x7F and ((bits[1] & 0x7F) == 0).sum() == 299
    assert (bits[2] == 0).all()
    assert (scales[:3] == quantize_rows(torch.zeros(1, 1, device=device), scale_format)[1]).all()
    for mine, alone in zip((codes, scales), rms_norm_quantize(x[3:], weight, EPS, scale_format), strict=True):
        assert_bitwise(mine[3:], alone, strides=False)


def test_powers_of_two_are_the_same_on_both_backends(triton_backend, device):
    """Their reciprocal root is exact: there, nothing tells the backends apart."""
    x = torch.where(torch.rand(7, 256) < 0.5, -1.0, 1.0) * 2.0 ** torch.arange(-3, 4)[:, None]
    x, weight = x.bfloat16().to(device), torch.randn(256, device=device).bfloat16()
    got = on_triton(rms_norm_quantize, x, weight, 0.0)
    assert_all_bitwise(got, on_reference(rms_norm_quantize, x, weight, 0.0))
    assert_all_bitwise(got, on_reference(quantize_rows, x.sign() * weight))


def test_outer_dimensions_are_rows(backend, device):
    x, residual, weight = operands(12, 130, torch.bfloat16, torch.bfloat16, device)
    flat = add_rms_norm_quantize(x, residual, weight, EPS)
    codes, scales, total = add_rms_norm_quantize(x.view(2, 3, 2, 130), residual.view(2, 3, 2, 130), weight, EPS)
    assert_all_bitwise((codes, scales, total.view(12, 130)), flat)
    assert_all_bitwise(rms_norm_quantize(x.view(3, 4, 130), weight, EPS), rms_norm_quantize(x, weight, EPS))


def test_other_layouts_give_the_same(triton_backend, device):
    wide = torch.randn(12, 40, device=device)
    weight = torch.randn(40, device=device)
    for x in (wide[:, ::2], wide[1:9, 4:30], wide.T, wide[:1].expand(6, 40)):
        arguments = (x, x, weight[: x.shape[1]], EPS)
        plain = (x.contiguous(), x.contiguous(), weight[: x.shape[1]].clone(), EPS)
        assert_all_bitwise(on_triton(add_rms_norm_quantize, *arguments), on_triton(add_rms_norm_quantize, *plain))


@pytest.mark.parametrize("shape", [(0, 256), (5, 0), (2, 0, 256)])
def test_nothing_in_nothing_out(backend, device, shape):
    x, weight = torch.zeros(shape, device=device), torch.ones(shape[-1], device=device)
    codes, scales, total = add_rms_norm_quantize(x, x, weight, EPS)
    rows = math.prod(shape[:-1])
    assert codes.shape == (rows, shape[-1]) and scales.shape == (rows, shape[-1] // 128) and total.shape == shape


def test_codes_carry_no_gradient_and_a_stream_does_not_lose_its_own(backend, device):
    x, residual, weight = operands(2, 130, torch.bfloat16, torch.bfloat16, device)
    weight.requires_grad_()
    assert not any(t.requires_grad for t in rms_norm_quantize(x.clone().requires_grad_(), weight, EPS))
    assert not any(t.requires_grad for t in add_rms_norm_quantize(x, residual, weight, EPS))
    for leaves in ((x.clone().requires_grad_(), residual), (x, residual.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"no gradient through codes, got x or residual that require one"):
            add_rms_norm_quantize(*leaves, weight, EPS)
        with torch.no_grad():
            assert_all_bitwise(
                add_rms_norm_quantize(*leaves, weight, EPS), add_rms_norm_quantize(x, residual, weight, EPS)
            )


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    x, residual, weight = operands(5, 200, torch.bfloat16, torch.bfloat16, device)

    def both(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        codes, scales, total = add_rms_norm_quantize(x * 2, residual, weight, EPS, "ue8m0")
        return codes, scales, *rms_norm_quantize(total, weight, EPS)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_all_bitwise(compiled(x, residual), both(x, residual))


def test_the_custom_operator_is_registered_properly(triton_backend, device):
    from deepseek_kernels.norm.rms_norm import launch

    x, residual, weight = operands(5, 200, torch.float32, torch.float32, device)
    for added in (None, residual):
        arguments = (x, added, weight, EPS, False)
        torch.library.opcheck(launch.quantize, arguments, test_utils=("test_schema", "test_faketensor"))


def test_kernels_say_what_they_do_not_take(triton_backend, device):
    x, weight = torch.ones(1, 16385, device=device), torch.ones(16385, device=device)
    with pytest.raises(BackendError, match=r"16384 features at most, got 16385"):
        on_triton(rms_norm_quantize, x, weight, EPS)
    with use_backend("auto"):
        assert rms_norm_quantize(x, weight, EPS)[0].shape == (1, 16385)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: rms_norm_quantize(x, w[1:], EPS), r"x \[..., H\] and weight \[H\], got \[2, 8\] and \[7\]"),
        (lambda x, w: add_rms_norm_quantize(x, x.T, w, EPS), r"a residual \[2, 8\], as x, got \[8, 2\]"),
        (lambda x, w: rms_norm_quantize(x.double(), w, EPS), r"x in float32, bfloat16 or float16, got torch.float64"),
        (lambda x, w: add_rms_norm_quantize(x, x.double(), w, EPS), r"residual in .*, got torch.float64"),
        (lambda x, w: rms_norm_quantize(x, w.double(), EPS), r"weight in .*, got torch.float64"),
        (lambda x, w: rms_norm_quantize(x, w, EPS, "e8m0"), r"None or 'ue8m0', got 'e8m0'"),
        (lambda x, w: add_rms_norm_quantize(x, x, w, EPS, "e8m0"), r"None or 'ue8m0', got 'e8m0'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 8), torch.ones(8))
