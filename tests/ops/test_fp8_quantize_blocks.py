"""FP8 quantization of weights, and back: the reference against its definition, the kernels against it, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.quant.fp8_quantize import dequantize_blocks, quantize_blocks, quantize_rows
from deepseek_kernels.testing.numeric import assert_bitwise
from support.fp8_definition import (
    E4M3,
    FORMATS,
    INPUTS,
    assert_all_bitwise,
    few_examples,
    hostile,
    matrix,
    on_reference,
    on_triton,
    plain_loop,
)

FLOOR = 448 * 2.0**-126  # the scale of a block is a normal number


def stack(experts: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return matrix(experts * rows, columns, dtype).view(experts, rows, columns)


# The reference against the definition.


@given(rows=st.integers(1, 5), columns=st.integers(1, 300), scale_format=st.sampled_from(FORMATS))
@few_examples
def test_blocks_of_any_size_follow_the_definition(rows, columns, scale_format):
    torch.manual_seed(rows * 1000 + columns)
    x = matrix(rows, columns)
    assert_all_bitwise(
        quantize_blocks(x, (3, 96), scale_format), plain_loop(x, (3, 96), FLOOR, scale_format == "ue8m0")
    )


@pytest.mark.parametrize("scale_format", FORMATS)
def test_blocks_of_tiny_and_hostile_weights_follow_the_definition(scale_format):
    x = hostile()
    codes, scale = quantize_blocks(x, (1, 128), scale_format)
    expected = plain_loop(x, (1, 128), FLOOR, scale_format == "ue8m0")
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
def test_each_part_of_each_expert_has_a_grid_of_its_own(backend, device, scale_format):
    """Gate above up, 10 rows each: blocks of 4 rows end at row 10, where the other matrix starts."""
    weight = stack(3, 20, 13).to(device)
    codes, scale = quantize_blocks(weight, (4, 8), scale_format, 2)
    assert codes.shape == (3, 20, 13) and scale.shape == (3, 6, 2)
    for expert in range(3):
        for part in range(2):
            rows, grid = slice(10 * part, 10 * part + 10), slice(3 * part, 3 * part + 3)
            alone = plain_loop(weight[expert, rows].cpu(), (4, 8), FLOOR, scale_format == "ue8m0")
            assert_bitwise(codes[expert, rows].cpu(), alone[0])
            assert_bitwise(scale[expert, grid].cpu(), alone[1])
    back = dequantize_blocks(codes, scale, (4, 8), torch.float32, 2)
    for expert in range(3):
        again = dequantize_blocks(codes[expert], scale[expert], (4, 8), torch.float32, 2)
        assert_bitwise(back[expert], again)
    assert_bitwise(quantize_blocks(weight[0], (4, 8), scale_format, 2)[1], scale[0])


# The kernels against the reference.


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
def test_kernel_is_bitwise_on_hostile_values(triton_backend, device, name, scale_format):
    arguments = (quantize_blocks, INPUTS[name]()[:16].to(device), (1, 128), scale_format)
    assert_all_bitwise(on_triton(*arguments), on_reference(*arguments))


@given(
    experts=st.integers(0, 2),  # 0: a matrix
    parts=st.integers(1, 2),
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    scale_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@few_examples
def test_kernels_are_bitwise_at_any_size(triton_backend, device, experts, parts, rows, columns, scale_format, dtype):
    torch.manual_seed(rows * 1000 + columns)
    x = stack(experts or 1, parts * rows, columns, dtype).to(device)
    arguments = (quantize_blocks, x if experts else x[0], (128, 64), scale_format, parts)
    expected = on_reference(*arguments)
    assert_all_bitwise(on_triton(*arguments), expected)
    arguments = (dequantize_blocks, *expected, (128, 64), dtype, parts)
    assert_bitwise(on_triton(*arguments), on_reference(*arguments))


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


def test_other_layouts_give_the_same(backend, device):
    wide = matrix(12, 300).to(device)
    for x in (wide[:, ::2], wide[1:9, 4:170], wide.T, wide[:1].expand(6, 300)):
        plain = x.contiguous()
        assert_all_bitwise(quantize_blocks(x), quantize_blocks(plain))
        codes, scale = quantize_blocks(plain)
        padded = torch.zeros(codes.shape[0], codes.shape[1] + 3, device=device).to(codes.dtype)[:, : codes.shape[1]]
        padded.copy_(codes)
        assert_bitwise(dequantize_blocks(padded, scale.T.contiguous().T), dequantize_blocks(codes, scale))
    experts = stack(2, 4, 20).to(device)
    turned = experts.transpose(0, 1)
    for x in (experts[::2], experts[:, 1:3], experts[:, :, ::3], turned, experts[:1].expand(3, -1, -1)):
        codes, scale = quantize_blocks(x.contiguous(), (4, 16), None, 2)
        assert_all_bitwise(quantize_blocks(x, (4, 16), None, 2), (codes, scale))
        wide = torch.zeros(len(x), x.shape[1] + 1, 32, device=device).to(codes.dtype)
        apart = wide[:, 1:, : x.shape[2]].copy_(codes)
        turned_scale = scale.transpose(0, 2).contiguous().transpose(0, 2)
        back = dequantize_blocks(apart, turned_scale, (4, 16), parts=2)
        assert_bitwise(back, dequantize_blocks(codes, scale, (4, 16), parts=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_into_a_tensor_of_any_layout(backend, device, dtype):
    """Only what `out` views is written; its dtype decides."""
    codes, scale = quantize_blocks(stack(2, 12, 10).to(device), (4, 8), None, 2)
    expected = dequantize_blocks(codes, scale, (4, 8), dtype, 2)
    whole = torch.full((3, 14, 24), 7.0, dtype=dtype, device=device)
    for view in (whole[1:, 1:13, 3:13], whole[:2, :12, ::2][..., :10], whole.transpose(1, 2)[:2, :12, :10]):
        whole.fill_(7.0)
        assert dequantize_blocks(codes, scale, (4, 8), torch.float16, 2, view) is view
        assert_bitwise(view, expected, strides=False)
        view.fill_(7.0)
        assert (whole == 7.0).all()


def test_out_may_be_a_parameter(backend, device):
    codes, scale = quantize_blocks(matrix(4, 5).to(device))
    parameter = torch.nn.Parameter(torch.zeros(4, 5, device=device))
    assert dequantize_blocks(codes, scale, out=parameter) is parameter
    assert_bitwise(parameter.detach(), dequantize_blocks(codes, scale, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0), (0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_nothing_in_nothing_out(backend, device, shape):
    codes, scale = quantize_blocks(torch.zeros(shape, device=device), parts=2 if len(shape) == 3 else 1)
    assert codes.shape == shape and not scale.numel()
    assert dequantize_blocks(codes, scale, parts=2 if len(shape) == 3 else 1).shape == shape


def test_results_carry_no_gradient(backend, device):
    assert not any(t.requires_grad for t in quantize_blocks(matrix(2, 130).to(device).requires_grad_()))


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    x = stack(2, 6, 200, torch.bfloat16).to(device)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        codes, scale = quantize_blocks(x, (4, 128), "ue8m0", 2)
        out = torch.zeros(2, 6, 201, dtype=x.dtype, device=x.device)
        dequantize_blocks(codes, scale, (4, 128), parts=2, out=out[..., 1:])
        return codes, scale, dequantize_blocks(codes, scale, (4, 128), parts=2), out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_all_bitwise(compiled(x), step(x))


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.quant.fp8_quantize import launch

    x = stack(2, 6, 200).to(device)
    codes, scale = launch.quantize_blocks(x, 64, 128, True, 2)
    torch.library.opcheck(launch.quantize_blocks, (x, 64, 128, True, 2), test_utils="test_faketensor")
    arguments = (torch.empty_like(x), codes, scale, 64, 128, 2)
    torch.library.opcheck(launch.dequantize_into, arguments, test_utils="test_faketensor")


# What users do wrong.


def codes_of(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize_blocks(x, (128, 0)), r"two positive block sizes, got \(128, 0\)"),
        (lambda x: quantize_blocks(x, parts=3), "divides 4 rows, got 3"),
        (lambda x: quantize_blocks(x, parts=0), "divides 4 rows, got 0"),
        (lambda x: quantize_blocks(x[0]), r"matrix or stack of matrices, got torch.float32 \[128\]"),
        (lambda x: quantize_blocks(x[None, None]), r"stack of matrices, got torch.float32 \[1, 1, 4, 128\]"),
        (
            lambda x: dequantize_blocks(x, x),
            r"float8_e4m3fn codes \[R, C\] or \[E, R, C\], got torch.float32 \[4, 128\]",
        ),
        (
            lambda x: dequantize_blocks(codes_of(x), torch.ones(2, 1)),
            r"float32 scales \[1, 1\] for \[4, 128\] codes in blocks of \[128, 128\], got torch.float32 \[2, 1\]",
        ),
        (lambda x: dequantize_blocks(codes_of(x), torch.ones(1, 1), parts=2), r"float32 scales \[2, 1\]"),
        (lambda x: dequantize_blocks(codes_of(x[None]), torch.ones(1, 1)), r"float32 scales \[1, 1, 1\]"),
        (lambda x: dequantize_blocks(codes_of(x), torch.ones(1, 1), parts=8), "divides 4 rows, got 8"),
        (
            lambda x: dequantize_blocks(codes_of(x), torch.ones(1, 1), dtype=torch.float64),
            r"dtype float32, bfloat16 or float16, got torch.float64",
        ),
        (
            lambda x: dequantize_blocks(codes_of(x), torch.ones(1, 1), out=x.T),
            r"expected out \[4, 128\] in float32, bfloat16 or float16, got torch.float32 \[128, 4\]",
        ),
        (lambda x: dequantize_blocks(codes_of(x), torch.ones(1, 1), out=x.double()), "got torch.float64"),
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
