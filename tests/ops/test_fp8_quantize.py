"""FP8 quantization of activations: the reference against its definition, the kernels against it, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels.quant.fp8_quantize import (
    dequantize_blocks,
    quantize_both,
    quantize_grouped_transposed,
    quantize_rows,
    quantize_transposed,
)
from deepseek_kernels.testing.numeric import assert_bitwise
from support.fp8_definition import (
    FORMATS,
    INPUTS,
    assert_all_bitwise,
    few_examples,
    matrix,
    on_reference,
    on_triton,
    plain_loop,
)

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
def test_rows_of_any_size_follow_the_definition(rows, columns, scale_format):
    torch.manual_seed(rows * 1000 + columns)
    x = matrix(rows, columns)
    got, expected = quantize_rows(x, scale_format), plain_loop(x, (1, 128), 1e-4, scale_format == "ue8m0")
    assert_bitwise(got[0], expected[0], strides=False)
    assert_bitwise(got[1], expected[1], strides=False)


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


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        (1, 1, torch.float32),
        (3, 128, torch.bfloat16),  # one group
        (9, 1100, torch.float16),  # the last row and column tiles partial, the last group too
    ],
)
def test_row_kernel_is_bitwise(quantization_tile, device, rows, columns, dtype, scale_format):
    x = matrix(rows, columns, dtype).to(device)
    assert_all_bitwise(on_triton(quantize_rows, x, scale_format), on_reference(quantize_rows, x, scale_format))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("quantize", [quantize_rows, quantize_transposed, quantize_both], ids=lambda f: f.__name__)
def test_kernels_are_bitwise_on_hostile_values(triton_backend, monkeypatch, device, quantize, name, scale_format):
    from deepseek_kernels.quant.fp8_quantize import configs

    monkeypatch.setattr(configs, "ENOUGH_PROGRAMS", 0)  # fewer programs, which the interpreter takes one by one
    x = INPUTS[name]().to(device)
    x = x.T.contiguous() if quantize is quantize_transposed else x
    assert_all_bitwise(on_triton(quantize, x, scale_format), on_reference(quantize, x, scale_format))


@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    scale_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@few_examples
def test_transposing_kernels_are_bitwise_at_any_size(triton_backend, device, rows, columns, scale_format, dtype):
    torch.manual_seed(rows * 1000 + columns)
    x = matrix(rows, columns, dtype).to(device)
    for quantize in (quantize_transposed, quantize_both):
        assert_all_bitwise(on_triton(quantize, x, scale_format), on_reference(quantize, x, scale_format))


# Rows of experts.


def ends_of(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)


ROUTINGS = {
    "one token": (1, ends_of(0, 1, 0)),
    "one expert": (130, ends_of(130)),
    "all to one of many": (200, ends_of(0, 0, 200, 0, 0)),
    "empty experts around": (300, ends_of(0, 128, 0, 0, 129, 0)),  # and 43 unassigned rows
    "full groups": (256, ends_of(128, 128)),
    "an expert each": (5, ends_of(1, 1, 1, 1, 1)),
    "unassigned": (7, ends_of(0, 0)),
    "no expert": (7, ends_of()),
    "no token": (0, ends_of(0, 0, 0)),
}


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_grouped_is_each_expert_transposed(backend, device, name, scale_format):
    rows, ends = ROUTINGS[name]
    x, ends = matrix(rows, 70, torch.bfloat16).to(device), ends.to(device)
    x[int(ends[-1]) if len(ends) else 0 :] = math.nan  # unassigned rows are not read
    codes, scales = quantize_grouped_transposed(x, ends, scale_format)
    capacity = -(-(rows + 127 * min(len(ends), rows)) // 128)
    assert codes.shape == (70, 128 * capacity) and scales.shape == (70, capacity)
    assert codes.stride(1) == 1 and scales.stride(0) == 1
    start = group = 0
    for end in ends.tolist():
        own, own_scales = on_reference(quantize_rows, x[start:end].T, scale_format)
        groups = own_scales.shape[1]
        assert_bitwise(scales[:, group : group + groups], own_scales, strides=False)
        tokens = codes[:, group * 128 : (group + groups) * 128]
        assert_bitwise(tokens[:, : end - start], own, strides=False)
        assert not tokens[:, end - start :].view(torch.uint8).any()
        start, group = end, group + groups
    assert not codes[:, group * 128 :].view(torch.uint8).any()
    _, of_zeros = on_reference(quantize_rows, torch.zeros(70, 1, device=device), scale_format)
    assert_bitwise(scales[:, group:], of_zeros.expand_as(scales[:, group:]), strides=False)


@given(
    counts=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    unassigned=st.integers(0, 3),
    columns=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@few_examples
def test_grouped_kernel_is_bitwise_at_any_size(triton_backend, device, counts, unassigned, columns, dtype):
    torch.manual_seed(sum(counts) * 100 + columns)
    x, ends = matrix(sum(counts) + unassigned, columns, dtype).to(device), ends_of(*counts).to(device)
    arguments = (quantize_grouped_transposed, x, ends)
    assert_all_bitwise(on_triton(*arguments), on_reference(*arguments))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("name", INPUTS)
def test_grouped_kernel_is_bitwise_on_hostile_values(triton_backend, device, name):
    """An infinity spoils its group of tokens, and leaves the columns without a token zeros."""
    x = INPUTS[name]().T.contiguous().to(device)
    ends = ends_of(3, x.shape[0] - 3).to(device)
    arguments = (quantize_grouped_transposed, x, ends)
    assert_all_bitwise(on_triton(*arguments), on_reference(*arguments))


# Both implementations alike.


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
    ends = torch.tensor([[2, -1], [2, -1], [6, -1]], device=device)[:, 0]
    for x in (wide[:, ::2], wide[1:9, 4:170], wide.T, wide[:1].expand(6, 300)):
        plain = x.contiguous()
        assert_all_bitwise(quantize_both(x), quantize_both(plain))
        grouped = quantize_grouped_transposed(plain, ends.contiguous())
        assert_all_bitwise(quantize_grouped_transposed(x, ends), grouped)


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0)])
def test_nothing_in_nothing_out(backend, device, shape):
    x = torch.zeros(shape, device=device)
    rows, columns = shape
    groups = [(rows, -(-columns // 128)), (columns, -(-rows // 128))]
    codes, scales, codes_t, scales_t = quantize_both(x)
    assert [codes.shape, scales.shape, codes_t.shape, scales_t.shape] == [shape, groups[0], shape[::-1], groups[1]]


def test_nan_stays_where_it_is_and_infinity_spoils_its_group(backend, device):
    x = torch.ones(1, 256, device=device)
    x[0, 3], x[0, 200] = math.nan, -math.inf
    codes, scales = quantize_rows(x)
    back = dequantize_blocks(codes, scales, (1, 128), torch.float32)
    assert back[0, :128].isnan().nonzero().tolist() == [[3]]
    assert scales[0, 1] == math.inf and back[0, 128:].isnan().all()


def test_results_carry_no_gradient(backend, device):
    x = matrix(2, 130).to(device).requires_grad_()
    ends = torch.tensor([2], device=device)
    assert not any(t.requires_grad for t in (*quantize_both(x), *quantize_grouped_transposed(x, ends)))


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    x, ends = matrix(5, 200, torch.bfloat16).to(device), torch.tensor([1, 5], device=device)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        # The reference of the grouped form looks at the ends, which no graph can.
        grouped = quantize_grouped_transposed(x, ends) if backend == "triton" else ()
        return *quantize_both(x + 1), *quantize_rows(x, "ue8m0"), *grouped

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_all_bitwise(compiled(x), step(x))


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.quant.fp8_quantize import launch

    x, ends = matrix(5, 200).to(device), torch.tensor([1, 5], device=device)
    for operator, arguments in (
        (launch.quantize_rows, (x, False)),
        (launch.quantize_transposed, (x, True)),
        (launch.quantize_both, (x, False)),
        (launch.quantize_grouped_transposed, (x, ends, False)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")  # shapes, dtypes, strides


# What users do wrong.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize_rows(x[0]), r"float16 matrix, got torch.float32 \[128\]"),
        (lambda x: quantize_both(x.double()), r"float16 matrix, got torch.float64 \[4, 128\]"),
        (lambda x: quantize_transposed(x, "e8m0"), r"None or 'ue8m0', got 'e8m0'"),
        (lambda x: quantize_rows(x[None]), r"float16 matrix, got torch.float32 \[1, 4, 128\]"),
        (lambda x: quantize_grouped_transposed(x, x[0]), r"int64 ends \[E\], got torch.float32 \[128\]"),
        (lambda x: quantize_grouped_transposed(x, torch.ones(1, 2).long()), r"got torch.int64 \[1, 2\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 128))
