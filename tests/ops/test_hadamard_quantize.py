"""The Hadamard rotation against its matrix, and quantization behind it."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import hadamard, hadamard_quantize, quantize_rows


def matrix(width: int) -> torch.Tensor:
    """Sylvester's construction, divided by the square root of its width."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < width:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / width**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 64, 128])
def test_equals_the_product_with_the_matrix(dtype, width):
    x = torch.randn(3, 5, width).to(dtype)
    want = x.double() @ matrix(width)
    # A value is a sum of D terms, log2(D) roundings in float32 or float64, then one to the dtype.
    eps = torch.finfo(dtype).eps + width.bit_length() * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert hadamard(x).dtype == dtype
    assert (hadamard(x).double() - want).abs().max() <= eps * want.abs().max() * 2


def test_is_its_own_inverse_and_keeps_products():
    x, y = torch.randn(4, 128, dtype=torch.float64), torch.randn(6, 128, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x) @ hadamard(y).T, x @ y.T)


def test_gradient():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(hadamard, x)


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizes_rotated_rows_rounded_to_their_dtype(scale_format, dtype):
    x = torch.randn(9, 128).to(dtype)
    x[0] = 0
    codes, scale = hadamard_quantize(x, scale_format)
    want = quantize_rows(hadamard(x), scale_format)
    assert torch.equal(codes.view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(scale, want[1])
    if scale_format == "ue8m0":
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))


def test_an_outlier_is_spread():
    """A row with one large value: rotated, its values share one magnitude, and none of them is lost to the scale."""
    x = torch.full((1, 128), 2.0**-11)
    x[0, 5] = 448.0
    plain, rotated = quantize_rows(x, "ue8m0"), hadamard_quantize(x, "ue8m0")
    assert plain[0].float().count_nonzero() < 128 and rotated[0].float().count_nonzero() == 128


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"a power of two of values, got torch.float32 \[2, 96\]"):
        hadamard(torch.zeros(2, 96))
    with pytest.raises(ValueError, match=r"matrix, got torch.float32 \[2, 3, 8\]"):
        hadamard_quantize(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match=r"scale_format None or 'ue8m0', got 'e8'"):
        hadamard_quantize(torch.zeros(2, 8), "e8")
