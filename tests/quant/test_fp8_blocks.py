"""FP8 blocks against plain Python loops over the definition of the formats, bit by bit."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_arch.quant.fp8_blocks import block_grid, decode_scale, dequantize_blocks, quantize_blocks


def decode(code: int) -> float:
    """The e4m3fn number of a byte: sign, 4 exponent bits (bias 7), 3 of mantissa; no infinity, NaN is all ones."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


POSITIVE = [decode(code) for code in range(0x7F)]  # ascending: the codes of 0 to 448


def encode(value: float) -> int:
    """The byte nearest to a number, ties to the even code, saturated at +-448."""
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    value = min(abs(value), 448.0)
    nearest = min(range(0x7F), key=lambda code: (abs(POSITIVE[code] - value), code & 1))
    return sign | nearest


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def round_to_bfloat16(value: float) -> float:
    """float32 -> bfloat16, ties to even, on the bits."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def codes_of(bytes_: torch.Tensor) -> torch.Tensor:
    return bytes_.to(torch.uint8).view(torch.float8_e4m3fn)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_all_256_codes_have_their_value():
    """Subnormals, both zeros and both NaNs included, in the first and last column of a block."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(16, 16)
    got = dequantize_blocks(codes_of(bytes_), torch.ones(1, 1), (16, 16), torch.float32)
    expected = torch.tensor([decode(code) for code in range(256)]).view(16, 16)
    nan = expected.isnan()
    assert nan.sum() == 2
    assert torch.equal(got.isnan(), nan)
    assert_same_bits(got[~nan], expected[~nan])


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_dequantizing_is_code_times_scale_rounded_once(rows, columns, block, dtype, seed):
    """TRAPS E1 (multiply) and E2 (the block size is given, edge blocks are partial), over odd shapes."""
    generator = torch.Generator().manual_seed(seed)
    bytes_ = torch.randint(0, 255, (rows, columns), generator=generator)
    bytes_[bytes_ == 0x7F] = 0  # NaN has many bit patterns
    scale = torch.randn(block_grid((rows, columns), block), generator=generator).abs()
    expected = torch.empty(rows, columns, dtype=torch.float32)
    for i in range(rows):
        for j in range(columns):
            value = float32(decode(int(bytes_[i, j])) * scale[i // block[0], j // block[1]].item())
            expected[i, j] = round_to_bfloat16(value) if dtype == torch.bfloat16 else value
    assert_same_bits(dequantize_blocks(codes_of(bytes_), scale, block, dtype), expected.to(dtype))


def test_partial_blocks_of_the_published_kv_a_projection():
    """576 rows in blocks of 128 have five scale rows, the last one over 64 rows; 576 / 5 is no block size."""
    scale = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    got = dequantize_blocks(torch.ones(576, 128).to(torch.float8_e4m3fn), scale, (128, 128), torch.float32)
    assert torch.equal(got[:, 0], scale[:, 0].repeat_interleave(128)[:576])


def test_a_block_size_cannot_be_guessed_from_the_shapes():
    """144 rows with two scale rows: 128 + 16, not 72 + 72 (TRAPS E2)."""
    got = dequantize_blocks(
        torch.ones(144, 1).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]]), dtype=torch.float32
    )
    assert got[:, 0].tolist() == [1.0] * 128 + [2.0] * 16


def test_dequantizing_writes_into_a_part_of_another_tensor():
    stacked = torch.full((2, 6, 5), math.nan)
    codes = torch.randn(3, 5).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2) + 0.5
    out = dequantize_blocks(codes, scale, (2, 3), out=stacked[1, 3:6])
    assert out.data_ptr() == stacked[1, 3:6].data_ptr()
    assert_same_bits(stacked[1, 3:6], dequantize_blocks(codes, scale, (2, 3), torch.float32))
    assert stacked[0].isnan().all() and stacked[1, :3].isnan().all()


def test_exponent_bytes_are_powers_of_two():
    """TRAPS E3: uint8 and float8_e8m0fnu hold b of 2^(b - 127); 0 is a subnormal float32."""
    bytes_ = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (b - 127) for b in range(255)], dtype=torch.float64).float()
    assert_same_bits(decode_scale(bytes_), expected)
    assert_same_bits(decode_scale(bytes_.view(torch.float8_e8m0fnu)), expected)


def test_a_negative_scale_is_an_error():
    scale = torch.ones(3, 2)
    scale[2, 1] = -0.5
    with pytest.raises(ValueError, match=r"expected scales >= 0, got -0.5 at \[2, 1\]"):
        decode_scale(scale)
    assert decode_scale(scale.clamp(min=0))[2, 1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_is_an_error(bad):
    scale = torch.ones(3, 2)
    scale[1, 0] = bad
    with pytest.raises(ValueError, match=rf"finite scales, got {bad} at \[1, 0\]"):
        decode_scale(scale)
    with pytest.raises(ValueError, match="finite scales"):
        decode_scale(torch.tensor([[127, 255]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), "float8_e4m3fn codes"),
        (torch.zeros(4).to(torch.float8_e4m3fn), torch.ones(1, 1), "float8_e4m3fn codes"),
        (torch.zeros(4, 6).to(torch.float8_e4m3fn), torch.ones(2, 1), r"scales \[1, 2\] for .* got .*\[2, 1\]"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1, dtype=torch.int32), "float8_e8m0fnu or uint8"),
    ],
)
def test_wrong_codes_and_scales_are_errors(codes, scale, message):
    with pytest.raises(ValueError, match=message):
        dequantize_blocks(codes, scale, (4, 4))


@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    scale_format=st.sampled_from([None, "ue8m0"]),
    spread=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_quantizing_is_amax_over_448_then_the_nearest_code(rows, columns, block, scale_format, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * spread
    codes, scale = quantize_blocks(weight, block, scale_format)
    for i in range(0, rows, block[0]):
        for j in range(0, columns, block[1]):
            values = weight[i : i + block[0], j : j + block[1]]
            expected = float32(values.abs().max().item() / 448)
            if scale_format:  # the next power of two, before the division (TRAPS E5)
                expected = 2.0 ** math.ceil(math.log2(expected))
            assert scale[i // block[0], j // block[1]].item() == expected
            got = codes[i : i + block[0], j : j + block[1]].contiguous().view(torch.uint8).flatten().tolist()
            assert got == [encode(float32(value / expected)) for value in values.flatten().tolist()]


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_rounding_error_is_half_a_step_of_the_format(scale_format):
    """e4m3 keeps 4 significant bits: at most 1/16 of the value, or of the smallest normal number below it."""
    weight = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_blocks(weight, (128, 128), scale_format)
    back = dequantize_blocks(codes, scale, (128, 128), torch.float32)
    per_element = scale.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :200]
    step = torch.maximum(weight.abs(), per_element * 2.0**-6) / 16
    # And 2^-22 for the two float32 roundings, of the quotient and of the product.
    assert ((back - weight).abs() <= step * (1 + 2.0**-17)).all()


def test_zero_blocks_and_tiny_blocks_stay_finite():
    """TRAPS E4: no division by zero, and what is too small for any scale becomes zero."""
    weight = torch.zeros(4, 4)
    weight[:2, 2:] = 1e-44
    weight[2:, :2] = 1e-36
    codes, scale = quantize_blocks(weight, (2, 2))
    assert scale.isfinite().all() and (scale > 0).all()
    back = dequantize_blocks(codes, scale, (2, 2), torch.float32)
    assert not back[:2].any() and not back[2:, 2:].any()
    # amax / 448 lies below the smallest normal float32, where the scale stops; codes are 85 of 448 then.
    assert torch.allclose(back[2:, :2], weight[2:, :2], rtol=1 / 16, atol=0)


def test_codes_saturate():
    """TRAPS E6: the largest value of a block may divide to just above 448, which is no code and must not be NaN."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 4, generator=generator).abs() * 1000
    codes, scale = quantize_blocks(weight, (1, 1))
    assert (weight / scale > 448).any(), "the rounding this is about does not occur"
    assert (codes.view(torch.uint8) == 0x7E).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_cannot_be_quantized(bad):
    weight = torch.ones(5, 5)
    weight[4, 4] = bad
    with pytest.raises(ValueError, match="finite weights"):
        quantize_blocks(weight, (4, 4))


def test_wrong_quantizing_arguments_are_errors():
    with pytest.raises(ValueError, match="floating-point matrix"):
        quantize_blocks(torch.ones(3))
    with pytest.raises(ValueError, match="ue8m0"):
        quantize_blocks(torch.ones(3, 3), scale_format="e8")
