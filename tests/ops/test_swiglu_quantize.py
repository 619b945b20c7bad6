"""SwiGLU with quantization against float64: codes may differ only where a tie is within an exponential's last bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import quantize_rows, swiglu_quantize, use_backend
from support.fp8_definition import FORMATS, INPUTS, assert_all_bitwise, few_examples, matrix, on_reference, on_triton

# numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice")

FLOOR, LARGEST, TINY = 1e-4, 448.0, 2.0**-126


def bounds(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of `silu(gate) * up` in float32: the exact value and the least and greatest magnitude, in float64.

    In units of 2^-24, half an ulp: a GPU computes exp(-g) as 2^(g * log2 e), the exponent rounded twice (product and
    constant), 2 |g|, then by an instruction that is right to 4. The sum with 1 adds 1, the division (of 2 ulps) 4, the
    product 1: 10 + 2 |g|, where for g > 0 the exponential matters less the larger g is: 2 |g| exp(-g) < 1. PyTorch's
    own exponential is better than that. A sigmoid below the normal numbers may be zero.
    """
    gate, up = gate.double(), up.double()
    exact = gate * torch.sigmoid(gate) * up
    relative = (11 + 2 * (-gate).clamp(min=0)) * 2.0**-24
    absolute = TINY * (1 + gate.abs() * up.abs())
    low = (exact.abs() * (1 - relative) - absolute).clamp(min=0)
    return exact, low, exact.abs() * (1 + relative) + absolute


def magnitude_codes(quotient: Tensor) -> Tensor:
    return quotient.float().clamp(max=LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def check(gate_up: Tensor, scale_format: str | None) -> float:
    """Scales and codes of finite values are between those that the bounds give; how many codes that leaves open."""
    codes, scales = (t.cpu() for t in swiglu_quantize(gate_up, scale_format))
    exact, low, high = bounds(*gate_up.cpu().chunk(2, dim=-1))
    undecided = 0.0
    rounding = 2.0**-22  # of amax / 448 and of the quotients, with some to spare
    for group in range(scales.shape[1]):
        columns = slice(group * 128, (group + 1) * 128)
        scale = scales[:, group, None].double()
        least, most = (bound[:, columns].amax(1, True).clamp(min=FLOOR) / LARGEST for bound in (low, high))
        if scale_format:
            least, most = (torch.exp2(torch.log2(bound.float().double()).ceil()) for bound in (least, most))
        assert ((least * (1 - rounding) <= scale) & (scale <= most * (1 + rounding))).all()
        got = codes[:, columns].view(torch.uint8)
        first = magnitude_codes(low[:, columns] / scale * (1 - rounding))
        last = magnitude_codes(high[:, columns] / scale * (1 + rounding))
        assert ((first <= (got & 0x7F)) & ((got & 0x7F) <= last)).all()
        assert ((got >> 7).bool() == exact[:, columns].signbit()).all()
        undecided += float((first != last).sum()) / exact.numel()
    return undecided


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gates up to some tens in both directions, up columns of very different size."""
    return torch.cat([8 * torch.randn(rows, columns), matrix(rows, columns)], 1).to(dtype)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        (1, 1, torch.float32),
        (3, 128, torch.bfloat16),  # one group
        (2, 1408, torch.bfloat16),  # an expert of V2-Lite: eleven groups, two tiles
        (9, 1100, torch.float16),  # the last row and column tiles partial, the last group too
    ],
)
def test_both_tiles_against_float64(quantization_tile, device, rows, columns, dtype, scale_format):
    with use_backend("triton"):
        assert check(inputs(rows, columns, dtype).to(device), scale_format) < 1e-3


@given(rows=st.integers(1, 4), columns=st.integers(1, 300), scale_format=st.sampled_from(FORMATS))
@few_examples
def test_any_size_against_float64(backend, device, rows, columns, scale_format):
    torch.manual_seed(rows * 1000 + columns)
    check(inputs(rows, columns).to(device), scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("up", [1.0, -1e30, 1e-30])
def test_gates_of_any_size_against_float64(backend, device, up, scale_format):
    """Down to where the exponential overflows, the sigmoid vanishes or the product does, up to where silu is linear."""
    gate = torch.cat([torch.linspace(-110, -80, 128), torch.linspace(-20, 20, 128)])[None]
    gate = torch.cat([gate, gate / 64, torch.zeros_like(gate)])
    check(torch.cat([gate, torch.full_like(gate, up)], 1).to(device), scale_format)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
def test_what_is_quantized_is_quantized_bit_by_bit_alike(triton_backend, device, name, scale_format):
    """A gate of 32 is its own silu in float32, so that the exponential has no say."""
    x = INPUTS[name]()[:16].to(device) / 32
    gate_up = torch.cat([torch.full_like(x, 32), x], 1)
    got = on_triton(swiglu_quantize, gate_up, scale_format)
    assert_all_bitwise(got, on_reference(swiglu_quantize, gate_up, scale_format))
    assert_all_bitwise(got, on_reference(quantize_rows, x.float() * 32, scale_format))


@pytest.mark.parametrize(
    ("gate", "up", "spoils_the_group"),
    [
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (0.0, math.inf, False),
        (-math.inf, 1.0, False),
        (math.inf, 0.0, False),
        (math.inf, 1.0, True),
        (2.0, -math.inf, True),
        (3e38, 3e38, True),  # the product overflows
    ],
)
def test_nan_stays_where_it_is_and_infinity_spoils_its_group(backend, device, gate, up, spoils_the_group):
    gate_up = torch.ones(2, 2 * 256, device=device)
    gate_up[0, 130], gate_up[0, 256 + 130] = gate, up
    codes, scales = swiglu_quantize(gate_up)
    nan = codes.view(torch.uint8) == 0x7F
    expected = torch.zeros_like(nan)
    expected[0, 128 if spoils_the_group else 130 : 256 if spoils_the_group else 131] = True
    assert torch.equal(nan, expected)
    others = scales.clone()
    others[0, 1] = scales[0, 0]
    assert (others == scales[0, 0]).all() and scales[0, 0].isfinite()
    assert (scales[0, 1] == math.inf) if spoils_the_group else (scales[0, 1] == scales[0, 0])


def test_layouts_are_those_of_quantize_rows(backend, device):
    for rows, columns in ((7, 130), (1, 1), (5, 128)):
        codes, scales = swiglu_quantize(inputs(rows, columns).to(device))
        plain = quantize_rows(torch.zeros(rows, columns, device=device))
        assert (codes.stride(), scales.stride()) == tuple(t.stride() for t in plain)
        assert (codes.shape, scales.shape) == tuple(t.shape for t in plain)


def test_other_layouts_of_the_input_give_the_same(backend, device):
    wide = 32 + 100 * torch.rand(12, 40, device=device)  # gates that are their own silu: PyTorch's depends on strides
    for x in (wide[:, ::2], wide[1:9, 4:30], wide.T, wide[:1].expand(6, 40)):
        assert_all_bitwise(swiglu_quantize(x), swiglu_quantize(x.contiguous()))


@pytest.mark.parametrize("shape", [(0, 256), (5, 0), (0, 0)])
def test_nothing_in_nothing_out(backend, device, shape):
    codes, scales = swiglu_quantize(torch.zeros(shape, device=device))
    assert codes.shape == (shape[0], shape[1] // 2) and scales.shape == (shape[0], shape[1] // 256)


def test_results_carry_no_gradient(backend, device):
    assert not any(t.requires_grad for t in swiglu_quantize(inputs(2, 130).to(device).requires_grad_()))


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    x = inputs(5, 200, torch.bfloat16).to(device)
    compiled = torch.compile(lambda x: swiglu_quantize(x * 2, "ue8m0"), fullgraph=True, backend="aot_eager")
    assert_all_bitwise(compiled(x), swiglu_quantize(x * 2, "ue8m0"))


def test_the_custom_operator_is_registered_properly(triton_backend, device):
    from deepseek_kernels.quant.swiglu_quantize import launch

    x = inputs(5, 200).to(device)
    torch.library.opcheck(launch.swiglu_quantize, (x, False), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("shape", "dtype", "scale_format", "message"),
    [
        ((4, 7), torch.float32, None, r"gate_up \[M, 2 I\] .*, got torch.float32 \[4, 7\]"),
        ((8,), torch.float32, None, r"got torch.float32 \[8\]"),
        ((2, 4, 8), torch.float32, None, r"got torch.float32 \[2, 4, 8\]"),
        ((4, 8), torch.float64, None, r"got torch.float64 \[4, 8\]"),
        ((4, 8), torch.float32, "e8m0", "None or 'ue8m0', got 'e8m0'"),
    ],
)
def test_wrong_arguments_are_named(shape, dtype, scale_format, message):
    with pytest.raises(ValueError, match=message):
        swiglu_quantize(torch.zeros(shape, dtype=dtype), scale_format)
