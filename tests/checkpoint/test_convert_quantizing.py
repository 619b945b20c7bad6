"""`Quantizer` gives the bits of `fp8.quantize_blocks`, whatever it quantized before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_arch.checkpoint.conversion.quantizer import Quantizer
from deepseek_arch.quant.fp8_blocks import block_grid, quantize_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One for all tests: buffers that an earlier matrix left must not show in a later one.
QUANTIZERS = {
    (size, format): Quantizer(size, format) for size in ((16, 12), (128, 128), (1, 3)) for format in (None, "ue8m0")
}


def quantized(quantizer: Quantizer, weight) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full(weight.shape, 7.0).to(torch.float8_e4m3fn)
    scale = torch.full(block_grid(weight.shape, quantizer.block_size), 7.0)
    quantizer.quantize(weight, codes, scale)
    return codes, scale


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    key=st.sampled_from(sorted(QUANTIZERS, key=str)),
    spread=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_bands_are_what_the_operator_gives(rows, columns, dtype, key, spread, seed):
    """Values of very different magnitudes, so that many codes are subnormal, and blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp2(torch.randint(-abs(spread), 1, weight.shape, generator=generator) + min(spread, 10))
    weight[: rows // 3, : columns // 2] = 0.0
    weight = weight.to(dtype)
    quantizer, (block, scale_format) = QUANTIZERS[key], key
    codes, scale = quantized(quantizer, weight)
    expected, expected_scale = quantize_blocks(weight, block, scale_format)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


def test_every_bfloat16_becomes_the_same_code():
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = weight[weight.isfinite()].sort().values  # neighbours share a block, or one block has them all
    weight = weight[: len(weight) // 128 * 128].view(-1, 128)
    for block in ((1, 128), (128, 128), (7, 5)):
        for scale_format in (None, "ue8m0"):
            codes, scale = quantized(Quantizer(block, scale_format), weight)
            expected, expected_scale = quantize_blocks(weight, block, scale_format)
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_errors(dtype, bad):
    weight = torch.randn(40, 30).to(dtype)
    weight[39, 29] = bad
    with pytest.raises(ValueError, match="expected finite weights, got NaN or infinity"):
        quantized(QUANTIZERS[(16, 12), None], weight)
