"""FP8 quantization: the reference against a loop over the definition, the kernels against the reference, bit by bit."""

from __future__ import annotations

import bisect
import itertools
import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.fp8_quantize import (
    dequantize_blocks,
    quantize_blocks,
    quantize_both,
    quantize_rows,
    quantize_transposed,
)
from deepseek_kernels.testing.numeric import assert_bitwise

FORMATS = [None, "ue8m0"]
QUANTIZERS = [quantize_rows, quantize_transposed, quantize_both, quantize_blocks]
# The fixtures that `given` would make anew for each example hold no state.
few_examples = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

# The definition, in Python's floats.

E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def encode(value: float) -> int:
    """The e4m3 byte nearest to a number, ties to the even byte."""
    if math.isnan(value):
        return 0x7F
    sign, value = (0x80 if math.copysign(1, value) < 0 else 0), abs(value)
    above = min(bisect.bisect_left(E4M3, value), len(E4M3) - 1)
    near = [code for code in (above - 1, above) if code >= 0]
    return sign | min(near, key=lambda code: (abs(E4M3[code] - value), code & 1))


def quantize_group(values: list[float], floor: float, power_of_two: bool) -> tuple[list[int], float]:
    amax = max([abs(v) for v in values if not math.isnan(v)] + [float32(floor)])
    if math.isinf(amax):
        return [0x7F] * len(values), math.inf
    scale = float32(amax / 448)  # one rounding: a float64 quotient of two float32 numbers is precise enough
    if power_of_two:
        mantissa, exponent = math.frexp(scale)
        scale = 2.0 ** (exponent - (mantissa == 0.5))
    return [encode(float32(v / scale)) for v in values], scale


def plain_loop(x: Tensor, block: tuple[int, int], floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Bytes and scales of a matrix, block by block."""
    rows, columns = x.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            down, across = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            part = x[down, across].float()
            found, scale = quantize_group(part.flatten().tolist(), floor, power_of_two)
            codes[down, across] = torch.tensor(found, dtype=torch.uint8).view_as(part)
            scales[i, j] = scale
    return codes.view(torch.float8_e4m3fn), scales


# What can go wrong in a group, one row each; the first values decide.
HOSTILE = {
    "zeros": [0.0, -0.0],  # TRAPS E4
    "below the floor": [1e-7, -2e-6, 1e-30],
    "subnormal": [1e-45, -1e-40, 1.1754944e-38],
    "largest": [3.4028235e38, -3.4028235e38, 1.0, 1e36],
    "nan": [math.nan, 1.0, -2.0, 448.0],
    "only nan": [math.nan] * 128,
    "infinity": [math.inf, 1.0, -2.0, 0.0],
    "both infinities and nan": [-math.inf, math.inf, math.nan, 3.0],
    "power of two": [448.0, 1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-11, -(2.0**-10)],  # scale 1; the least codes and ties
    "ties": [448.0, 17.0, 19.0, 432.0, 416.0, -17.0, 31.76, -124.3],
    "just above a power of two": [448.0001, 447.9999, 1.0],  # ue8m0 rounds the scale up, not to nearest
}


def hostile(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.zeros(len(HOSTILE), 128)
    for row, values in enumerate(HOSTILE.values()):
        x[row, : len(values)] = torch.tensor(values)
    return x.to(dtype)


def near_ties() -> Tensor:
    """Groups whose quotients are within some ulps of where a code changes: division decides, not luck."""
    amax = torch.rand(64) * 1000 + 1
    scale = amax / 448
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E4M3)])  # [126]
    x = middles * scale[:, None]
    steps = torch.randint(-2, 3, x.shape, dtype=torch.int32)
    x = (x.view(torch.int32) + steps).view(torch.float32) * torch.where(torch.rand(x.shape) < 0.5, -1.0, 1.0)
    return torch.cat([amax[:, None], x, amax[:, None]], 1)  # [64, 128]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns of very different size, as in activations with outliers."""
    return (torch.randn(rows, columns) * 2.0 ** torch.randint(-12, 8, (columns,))).to(dtype)


INPUTS = {
    "hostile": hostile,
    "hostile in bfloat16": lambda: hostile(torch.bfloat16),
    "near ties": near_ties,
    # Below the floor of activations, just above that of weights, where float32 itself runs out of bits.
    "tiny near ties": lambda: near_ties() * 2.0**-124,
    "usual": lambda: matrix(3, 300),
}


def on_triton(function, *arguments):
    with use_backend("triton"):
        return function(*arguments)


def on_reference(function, *arguments):
    with use_backend("reference"):
        return function(*arguments)


def assert_all_bitwise(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_bitwise(a, b)


# The reference against the definition.


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
def test_rows_follow_the_definition(name, scale_format):
    x = INPUTS[name]()[:16]
    codes, scales = quantize_rows(x, scale_format)
    expected = plain_loop(x, (1, 128), 1e-4, scale_format == "ue8m0")
    assert_bitwise(codes, expected[0], strides=False)
    assert_bitwise(scales, expected[1], strides=False)


@given(rows=st.integers(1, 5), columns=st.integers(1, 300), scale_format=st.sampled_from(FORMATS))
@few_examples
def test_rows_and_blocks_of_any_size_follow_the_definition(rows, columns, scale_format):
    torch.manual_seed(rows * 1000 + columns)
    x = matrix(rows, columns)
    for got, block, floor in (
        (quantize_rows(x, scale_format), (1, 128), 1e-4),
        (quantize_blocks(x, (3, 96), scale_format), (3, 96), 448 * 2.0**-126),
    ):
        expected = plain_loop(x, block, floor, scale_format == "ue8m0")
        assert_bitwise(got[0], expected[0], strides=False)
        assert_bitwise(got[1], expected[1], strides=False)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_blocks_of_tiny_and_hostile_weights_follow_the_definition(scale_format):
    x = hostile()
    codes, scale = quantize_blocks(x, (1, 128), scale_format)
    expected = plain_loop(x, (1, 128), 448 * 2.0**-126, scale_format == "ue8m0")
    assert_all_bitwise((codes, scale), expected)
    assert (scale >= torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_codes_dequantize_to_code_times_scale(device, dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(2, 128).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.3], [1.7]], device=device)
    got = dequantize_blocks(codes, scale, (1, 128), dtype)
    values = torch.tensor([*E4M3, math.nan, *(-v for v in E4M3), math.nan]).view(2, 128)
    assert_bitwise(got.cpu().nan_to_num(), (values * scale.cpu()).to(dtype).nan_to_num())
    assert torch.equal(got.cpu().isnan(), values.isnan())


@pytest.mark.parametrize("scale_format", FORMATS)
def test_what_comes_back_is_within_half_a_step(scale_format):
    """Half a unit of the last of 4 significant bits, or of the least code: the scale is rounded first (TRAPS E5)."""
    x = matrix(16, 384)
    codes, scales = quantize_rows(x, scale_format)
    back = dequantize_blocks(codes, scales, (1, 128), torch.float32)
    per_value = scales.repeat_interleave(128, 1)
    bound = torch.maximum(x.abs() * 2.0**-4, per_value * 2.0**-10) * (1 + 2.0**-20)  # and the float32 roundings
    assert ((back - x).abs() <= bound).all()
    if scale_format:
        assert (scales.log2() == scales.log2().round()).all()
        assert (per_value * 448 >= x.abs() * (1 - 2.0**-23)).all() and (scales <= 2 * quantize_rows(x)[1]).all()


# The kernels against the reference.


@pytest.fixture(params=["few", "many"])
def tile(request, triton_backend, monkeypatch):
    """Either tile of the row-wise kernel, whatever the size."""
    from deepseek_kernels.fp8_quantize import kernel

    monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", 0 if request.param == "many" else math.inf)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        (1, 1, torch.float32),
        (3, 128, torch.bfloat16),  # one group
        (9, 1100, torch.float16),  # the last row and column tiles partial, the last group too
    ],
)
def test_row_kernel_is_bitwise(tile, device, rows, columns, dtype, scale_format):
    x = matrix(rows, columns, dtype).to(device)
    assert_all_bitwise(on_triton(quantize_rows, x, scale_format), on_reference(quantize_rows, x, scale_format))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda f: f.__name__)
def test_kernels_are_bitwise_on_hostile_values(triton_backend, monkeypatch, device, quantize, name, scale_format):
    from deepseek_kernels.fp8_quantize import kernel

    monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", 0)  # fewer programs, which the interpreter takes one by one
    x = INPUTS[name]().to(device)
    x = x.T.contiguous() if quantize is quantize_transposed else x
    arguments = (x, (1, 128), scale_format) if quantize is quantize_blocks else (x, scale_format)
    if quantize is quantize_blocks:
        arguments = (x[:16], *arguments[1:])  # one program a block
    assert_all_bitwise(on_triton(quantize, *arguments), on_reference(quantize, *arguments))


@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    scale_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@few_examples
def test_transposing_and_block_kernels_are_bitwise_at_any_size(
    triton_backend, device, rows, columns, scale_format, dtype
):
    torch.manual_seed(rows * 1000 + columns)
    x = matrix(rows, columns, dtype).to(device)
    for quantize in (quantize_transposed, quantize_both, lambda x, f: quantize_blocks(x, (128, 64), f)):
        expected = on_reference(quantize, x, scale_format)
        assert_all_bitwise(on_triton(quantize, x, scale_format), expected)
    arguments = (*expected, (128, 64), dtype)
    assert_bitwise(on_triton(dequantize_blocks, *arguments), on_reference(dequantize_blocks, *arguments))


@pytest.mark.parametrize("shape", [(192, 256), (576, 130)])  # kv_a_proj of V3 has 576 rows: four blocks and a half
def test_block_kernels_on_published_shapes(triton_backend, device, shape):
    weight = matrix(*shape, torch.bfloat16).to(device)
    expected = on_reference(quantize_blocks, weight)
    assert_all_bitwise(on_triton(quantize_blocks, weight), expected)
    assert_bitwise(on_triton(dequantize_blocks, *expected), on_reference(dequantize_blocks, *expected))


def test_activations_are_read_back_by_the_block_kernel(triton_backend, device):
    """Their scales are stored column by column."""
    x = matrix(5, 300).to(device)
    arguments = (*on_reference(quantize_rows, x), (1, 128), torch.float32)
    assert_bitwise(on_triton(dequantize_blocks, *arguments), on_reference(dequantize_blocks, *arguments))


# Both implementations alike.


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("scale_format", FORMATS)
def test_transposed_is_rows_of_the_transpose(backend, device, scale_format):
    """Groups of tokens, not transposed groups of features (TRAPS E9)."""
    x = matrix(20, 70, torch.bfloat16).to(device)
    rows, columns = quantize_rows(x, scale_format), quantize_rows(x.T.contiguous(), scale_format)
    assert_all_bitwise(quantize_transposed(x, scale_format), columns)
    assert_all_bitwise(quantize_both(x, scale_format), (*rows, *columns))


def test_layouts_are_what_products_read(backend, device):
    codes, scales, codes_t, scales_t = quantize_both(matrix(7, 130).to(device))
    assert codes.shape == (7, 130) and codes.stride() == (144, 1)  # 16 bytes
    assert codes_t.shape == (130, 7) and codes_t.stride() == (16, 1)
    assert scales.shape == (7, 2) and scales.stride() == (1, 8)  # 16 bytes are 4 numbers
    assert scales_t.shape == (130, 1) and scales_t.stride() == (1, 132)


def test_other_layouts_of_the_input_give_the_same(backend, device):
    wide = matrix(12, 300).to(device)
    for x in (wide[:, ::2], wide[1:9, 4:170], wide.T, wide[:1].expand(6, 300)):
        plain = x.contiguous()
        assert_all_bitwise(quantize_both(x), quantize_both(plain))
        assert_all_bitwise(quantize_blocks(x), quantize_blocks(plain))
        codes, scale = quantize_blocks(plain)
        padded = torch.zeros(codes.shape[0], codes.shape[1] + 3, device=device).to(codes.dtype)[:, : codes.shape[1]]
        padded.copy_(codes)
        assert_bitwise(dequantize_blocks(padded, scale.T.contiguous().T), dequantize_blocks(codes, scale))


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0)])
def test_nothing_in_nothing_out(backend, device, shape):
    x = torch.zeros(shape, device=device)
    rows, columns = shape
    groups = [(rows, -(-columns // 128)), (columns, -(-rows // 128))]
    codes, scales, codes_t, scales_t = quantize_both(x)
    assert [codes.shape, scales.shape, codes_t.shape, scales_t.shape] == [shape, groups[0], shape[::-1], groups[1]]
    codes, scale = quantize_blocks(x)
    assert codes.shape == shape and dequantize_blocks(codes, scale).shape == shape


def test_nan_stays_where_it_is_and_infinity_spoils_its_group(backend, device):
    x = torch.ones(1, 256, device=device)
    x[0, 3], x[0, 200] = math.nan, -math.inf
    codes, scales = quantize_rows(x)
    back = dequantize_blocks(codes, scales, (1, 128), torch.float32)
    assert back[0, :128].isnan().nonzero().tolist() == [[3]]
    assert scales[0, 1] == math.inf and back[0, 128:].isnan().all()


def test_results_carry_no_gradient(backend, device):
    x = matrix(2, 130).to(device).requires_grad_()
    assert not any(t.requires_grad for t in (*quantize_both(x), *quantize_blocks(x)))


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    x = matrix(5, 200, torch.bfloat16).to(device)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        codes, scale = quantize_blocks(x, scale_format="ue8m0")
        return *quantize_both(x + 1), codes, dequantize_blocks(codes, scale)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_all_bitwise(compiled(x), step(x))


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.fp8_quantize import kernel

    x = matrix(5, 200).to(device)
    codes, scale = kernel.quantize_blocks(x, 128, 128, False)
    for operator, arguments in (
        (kernel.quantize_rows, (x, False)),
        (kernel.quantize_transposed, (x, True)),
        (kernel.quantize_both, (x, False)),
        (kernel.quantize_blocks, (x, 64, 128, True)),
        (kernel.dequantize_blocks, (codes, scale, 128, 128, torch.bfloat16)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")  # shapes, dtypes, strides


# What users do wrong.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize_rows(x[0]), r"float16 matrix, got torch.float32 \[128\]"),
        (lambda x: quantize_both(x.double()), r"float16 matrix, got torch.float64 \[4, 128\]"),
        (lambda x: quantize_transposed(x, "e8m0"), r"None or 'ue8m0', got 'e8m0'"),
        (lambda x: quantize_blocks(x, (128, 0)), r"two positive block sizes, got \(128, 0\)"),
        (lambda x: dequantize_blocks(x, x), r"float8_e4m3fn codes \[R, C\], got torch.float32 \[4, 128\]"),
        (
            lambda x: dequantize_blocks(x.to(torch.float8_e4m3fn), torch.ones(2, 1)),
            r"float32 scales \[1, 1\] for \[4, 128\] codes in blocks of \[128, 128\], got torch.float32 \[2, 1\]",
        ),
        (
            lambda x: dequantize_blocks(x.to(torch.float8_e4m3fn), torch.ones(1, 1), dtype=torch.float64),
            r"dtype float32, bfloat16 or float16, got torch.float64",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 128))


def test_blocks_that_no_kernel_takes(triton_backend, device):
    x = matrix(5, 200).to(device)
    assert quantize_blocks(x, (100, 100))[1].shape == (1, 2)  # auto: the reference
    with use_backend("triton"), pytest.raises(BackendError, match=r"powers of two up to 128, got \[100, 100\]"):
        quantize_blocks(x, (100, 100))
