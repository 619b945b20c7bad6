"""FP8 weights under activations of high precision: against the definition in float64, forward and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import (
    dequantize_blocks,
    fp8_weight_gemm,
    fp8_weight_grouped_gemm,
    quantize_blocks,
    use_native_half_matmul,
)
from deepseek_kernels.gemm.fp8_weight_gemm import reference
from deepseek_kernels.testing.numeric import assert_bitwise

FEW, MANY = 3, reference.FEW_ROWS + 5  # rows of activations: each way of applying the scales
SMALL_TILE = 700  # codes: several tiles for matrices that a test can afford
few_examples = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# The definition: sign, exponent of bias 7, three bits of mantissa, no infinity, two NaN. float64 holds code * scale
# exactly.
POSITIVE = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
VALUES = torch.tensor([*POSITIVE[:-1], math.nan, *(-v for v in POSITIVE[:-1]), math.nan], dtype=torch.float64)


def random_codes(*shape: int) -> Tensor:
    """Every byte but the two NaN."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    return bits.masked_fill_(bits & 0x7F == 0x7F, 0x07).view(torch.float8_e4m3fn)


def random_scale(weight: Tensor, block_size: tuple[int, int], parts: int = 1) -> Tensor:
    *experts, rows, columns = weight.shape
    down, across = parts * -(-(rows // parts) // block_size[0]), -(-columns // block_size[1])
    return torch.exp(torch.randn(*experts, down, across) - 7)


def dequantized(weight: Tensor, scale: Tensor, block_size: tuple[int, int], parts: int = 1) -> Tensor:
    """[N, K] float64, element by element's own scale."""
    rows, columns = weight.shape
    height = rows // parts
    own = [part * -(-height // block_size[0]) + row // block_size[0] for part in range(parts) for row in range(height)]
    across = [column // block_size[1] for column in range(columns)]
    return VALUES[weight.view(torch.uint8).long()] * scale.double()[own][:, across]


def multiplied(w: Tensor, rows: int, dtype: torch.dtype, native: bool) -> Tensor:
    """The weight that the operator promises to multiply: `w` itself, or `w` as `dequantize_blocks` rounds it."""
    if native and rows >= reference.FEW_ROWS:
        return w.float().to(dtype).double()
    return w


def assert_product(got: Tensor, x: Tensor, w: Tensor) -> None:
    """`got` is x [M, K] @ w [K, N], summed in float32 in any order and rounded once to its dtype.

    With w in 16 bits, products are exact and at most K sums are rounded. Otherwise, of each term, the factor that the
    scale went into is rounded, then the product, then at most K sums: K + 2 roundings of 2^-24 relative to the sum of
    magnitudes, to first order; K + 3 covers the others (K < 2^12). The result's own rounding is relative to it, or
    absolute where it is subnormal.
    """
    exact, magnitude = x.double() @ w, x.double().abs() @ w.abs()
    float32 = (x.shape[1] + 3) * 2.0**-24 * magnitude
    own = torch.finfo(got.dtype)
    bound = float32 + own.eps / 2 * (exact.abs() + float32).clamp(min=own.smallest_normal)
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound).all(), ((got.double() - exact).abs() - bound).max()


@pytest.fixture(params=["one tile", "several tiles"])
def tile(request, monkeypatch) -> None:
    if request.param == "several tiles":
        monkeypatch.setattr(reference, "TILE", SMALL_TILE)


# Values.


@pytest.mark.parametrize("rows", [1, MANY])
def test_every_code_is_exact(rows):
    """Subnormals, both zeros' values, the largest, NaN: codes times one, at scale one."""
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    got = fp8_weight_gemm(torch.ones(rows, 1), weight, torch.ones(2, 1))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, VALUES.float().expand(rows, 256), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "block_size"), [((130, 260), (128, 128)), ((57, 96), (32, 32)), ((9, 40), (1, 32))])
def test_product_and_gradient(tile, native, rows, dtype, shape, block_size):
    weight = random_codes(*shape)
    scale = random_scale(weight, block_size)
    x = torch.randn(rows, shape[1]).to(dtype).requires_grad_()
    y = fp8_weight_gemm(x, weight, scale, block_size)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    w = multiplied(dequantized(weight, scale, block_size), rows, dtype, native)
    assert y.dtype == x.grad.dtype == dtype
    assert_product(y.detach(), x.detach(), w.T)
    assert_product(x.grad, grad, w)


@pytest.mark.parametrize(("shape", "grid"), [((576, 7168), (5, 56)), ((192, 256), (2, 2))])
def test_shapes_that_others_read_wrongly(shape, grid):
    """Partial blocks at the lower edge: 64 rows each."""
    weight = random_codes(*shape)
    scale = random_scale(weight, (128, 128))
    assert scale.shape == grid
    x = torch.randn(1, shape[1])
    assert_product(fp8_weight_gemm(x, weight, scale), x, dequantized(weight, scale, (128, 128)).T)


@few_examples
@given(
    rows=st.integers(0, MANY),
    height=st.integers(0, 20),
    columns=st.integers(0, 40),
    block_size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    parts=st.integers(1, 3),
    most=st.sampled_from([1, 50, 333, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(native, rows, height, columns, block_size, parts, most, dtype, data, seed):
    """Stacked experts of stacked parts, any block, any split of the rows among experts, some rows unassigned."""
    torch.manual_seed(seed)
    weight = random_codes(3, parts * height, columns)
    scale = random_scale(weight, block_size, parts)
    ends = torch.tensor(sorted(data.draw(st.lists(st.integers(0, rows), min_size=3, max_size=3))))
    x = torch.randn(rows, columns).to(dtype).requires_grad_()
    grad = torch.randn(rows, parts * height).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "TILE", most)
        y = fp8_weight_grouped_gemm(x, weight, scale, ends, block_size, parts)
        y.backward(grad)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        w = multiplied(dequantized(weight[expert], scale[expert], block_size, parts), end - start, dtype, native)
        assert_product(y.detach()[start:end], x.detach()[start:end], w.T)
        assert_product(x.grad[start:end], grad[start:end], w)
        start = end
    assert not y[start:].any() and not x.grad[start:].any()


def test_equals_the_product_with_dequantized_blocks():
    """W8A16 is the dequantized model to rounding."""
    weight, scale = quantize_blocks(torch.randn(200, 300))
    x = torch.randn(5, 300)
    expected = dequantize_blocks(weight, scale, dtype=torch.float32)
    assert_product(fp8_weight_gemm(x, weight, scale), x, expected.double().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [reference.FEW_ROWS - 1, reference.FEW_ROWS])
def test_where_16_bit_products_are_native_tiles_are_the_dequantized_weight_to_the_bit(tile, rows, dtype):
    """Unit vectors read the weight that is multiplied, in the product and in its derivative."""
    weight = random_codes(rows, rows)
    scale = random_scale(weight, (16, 16))
    x = torch.eye(rows, dtype=dtype, requires_grad=True)
    with use_native_half_matmul(True):
        y = fp8_weight_gemm(x, weight, scale, (16, 16))
        y.backward(torch.eye(rows, dtype=dtype))
    expected = dequantize_blocks(weight, scale, (16, 16), dtype)
    assert torch.equal(y, expected.T) and torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_against_the_unrounded_weight(native, dtype):
    """Bound against a float32 weight: its rounding to 16 bits, half a unit in the last place and no more.

    A weight rounded to float32, then to 16 bits, is off by `own` + 2^-24 of itself (and their product), or of the least
    normal number where it is smaller.
    """
    weight = random_codes(130, 260)
    scale = random_scale(weight, (128, 128))
    x, w = torch.randn(MANY, 260, dtype=dtype), dequantized(weight, scale, (128, 128)).T
    own = torch.finfo(dtype)
    exact, size = x.double() @ w, x.double().abs()
    unit = 2.0**-24
    rounded = (own.eps / 2 * (1 + unit) + unit) * w.abs().clamp(min=own.smallest_normal) if native else 0 * w
    summed = size @ (rounded + (260 + 3) * unit * (w.abs() + rounded))
    bound = summed + own.eps / 2 * (exact.abs() + summed).clamp(min=own.smallest_normal)
    assert ((fp8_weight_gemm(x, weight, scale).double() - exact).abs() <= bound).all()


# NaN.


@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [(0, 0), (129, 259), (70, 131)])
def test_nan_code_spoils_its_row_and_nothing_else(tile, rows, code, place):
    """Also one that is written after a product with the same tensor."""
    weight = random_codes(130, 260)
    scale = random_scale(weight, (128, 128))
    x = torch.randn(rows, 260, requires_grad=True)
    before = fp8_weight_gemm(x, weight, scale)
    weight.view(torch.uint8)[place] = code
    y = fp8_weight_gemm(x, weight, scale)
    y.backward(torch.ones_like(y))
    outputs, inputs = torch.arange(130) == place[0], torch.arange(260) == place[1]
    assert y[:, outputs].isnan().all() and x.grad[:, inputs].isnan().all()
    assert not before.isnan().any() and not x.grad[:, ~inputs].isnan().any()
    assert_bitwise(y[:, ~outputs], before[:, ~outputs], strides=False)


@pytest.mark.parametrize("rows", [1, MANY])
def test_activations_and_scales_that_are_not_finite_spread_as_in_the_dequantized_product(rows):
    weight = random_codes(4, 6)
    scale = torch.tensor([[1.0, math.inf], [math.nan, 0.0]])
    x = torch.randn(rows, 6)
    x[0, 0], x[0, 4] = math.inf, 0.0
    got = fp8_weight_gemm(x, weight, scale, (2, 3))
    expected = x.double() @ dequantized(weight, scale, (2, 3)).T
    finite = expected.isfinite()
    assert_bitwise(got[~finite], expected[~finite].float().where(~expected[~finite].isnan(), got[~finite]))
    assert (got.isnan() == expected.isnan()).all() and (got.isfinite() == finite).all()


# Experts.


def test_experts_without_rows_are_not_read(tile, monkeypatch):
    """Nor are unassigned rows."""
    read, codes = set(), reference.Expansion.codes
    monkeypatch.setattr(
        reference.Expansion,
        "codes",
        lambda self, weight, tile: read.add(weight.data_ptr()) or codes(self, weight, tile),
    )
    weight, scale = random_codes(4, 24, 40), torch.full((4, 4, 3), math.nan)
    weight.view(torch.uint8)[[0, 3]] = 0x7F
    scale[1:3] = random_scale(weight[1:3], (8, 16), 2)
    x = torch.randn(9, 40)
    x[7:] = math.nan
    x.requires_grad_()
    ends = torch.tensor([0, 5, 7, 7])
    y = fp8_weight_grouped_gemm(x, weight, scale, ends, (8, 16), 2)
    y.backward(torch.cat([torch.ones(7, 24), torch.full((2, 24), math.nan)]))
    for expert, rows in ((1, slice(0, 5)), (2, slice(5, 7))):
        w = dequantized(weight[expert], scale[expert], (8, 16), 2)
        assert_product(y.detach()[rows], x.detach()[rows], w.T)
        assert_product(x.grad[rows], torch.ones(rows.stop - rows.start, 24), w)
    assert not y[7:].any() and not x.grad[7:].any()
    assert read == {weight[1].data_ptr(), weight[2].data_ptr()}


def test_each_part_has_a_grid_of_its_own():
    """Gate above up, 1408 rows each: 11 blocks each, exactly; 1400 rows: the 11th partial, and 22, not 21, in all."""
    for height in (1408, 1400):
        weight = random_codes(2, 2 * height, 64)
        scale = random_scale(weight, (128, 128), 2)
        assert scale.shape == (2, 22, 1)
        x = torch.randn(3, 64)
        got = fp8_weight_grouped_gemm(x, weight, scale, torch.tensor([1, 3]), parts=2)
        for expert, rows in ((0, slice(0, 1)), (1, slice(1, 3))):
            w = torch.cat(
                [
                    dequantized(half, own, (128, 128))
                    for half, own in zip(weight[expert].split(height), scale[expert].split(11), strict=True)
                ]
            )
            assert_product(got[rows], x[rows], w.T)


# Layouts, dtypes, modes.


@pytest.mark.parametrize("rows", [1, MANY])
def test_other_layouts_give_the_same(tile, rows):
    weight = random_codes(40, 50)
    scale, x = random_scale(weight, (16, 16)), torch.randn(rows, 50)
    w = dequantized(weight, scale, (16, 16)).T
    wide = torch.zeros(80, 103, dtype=torch.uint8)
    wide[::2, 1:101:2] = weight.view(torch.uint8)  # odd addresses, gaps
    transposed = weight.view(torch.uint8).T.contiguous().T
    for other in (wide.view(torch.float8_e4m3fn)[::2, 1:101:2], transposed.view(torch.float8_e4m3fn)):
        y = fp8_weight_gemm(x.T.contiguous().T, other, scale.T.contiguous().T, (16, 16))
        assert y.is_contiguous()
        assert_product(y, x, w)
    repeated = x[:1].expand(rows, 50)
    assert_product(fp8_weight_gemm(repeated, weight, scale, (16, 16)), repeated, w)


def test_leading_dimensions():
    weight = random_codes(20, 30)
    scale = random_scale(weight, (128, 128))
    x = torch.randn(2, 3, 30)
    y = fp8_weight_gemm(x, weight, scale)
    assert_bitwise(y, fp8_weight_gemm(x.view(6, 30), weight, scale).view(2, 3, 20))
    assert fp8_weight_gemm(x[0, 0], weight, scale).shape == (20,)
    assert fp8_weight_gemm(x[:, :0], weight, scale).shape == (2, 0, 20)
    nothing = fp8_weight_gemm(x[..., :0], weight[:, :0], scale[:, :0])
    assert nothing.shape == (2, 3, 20) and not nothing.any()


def test_autocast_casts_the_activations(tile):
    weight = random_codes(20, 30)
    scale = random_scale(weight, (128, 128))
    x = torch.randn(4, 30, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_weight_gemm(x, weight, scale)
        z = fp8_weight_grouped_gemm(x, weight[None], scale[None], torch.tensor([4]))
    assert_bitwise(y.detach(), fp8_weight_gemm(x.detach().bfloat16(), weight, scale))
    assert_bitwise(z.detach(), y.detach())
    (y + z).sum().backward()
    assert x.grad.dtype == torch.float32


def test_codes_and_scales_get_no_gradient():
    weight = random_codes(20, 30)
    scale = random_scale(weight, (128, 128)).requires_grad_()
    x = torch.randn(4, 30, requires_grad=True)
    fp8_weight_gemm(x, weight, scale).sum().backward()
    assert scale.grad is None and x.grad is not None


@pytest.mark.parametrize("rows", [1, MANY])
def test_compiled_gives_the_same(rows):
    torch.compiler.reset()
    weight = random_codes(2, 24, 40)
    scale, ends = random_scale(weight, (8, 16), 2), torch.tensor([rows // 2, rows])

    def step(x: Tensor) -> Tensor:
        y = fp8_weight_grouped_gemm(x + 1, weight, scale, ends, (8, 16), 2)
        return fp8_weight_gemm(y.unsqueeze(0), weight[0, :, :24], scale[0, :, :2], (6, 16)).sum()

    x = torch.randn(rows, 40)
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = step(eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    expected.backward()
    got.backward()
    assert_bitwise(got.detach(), expected.detach())
    assert_bitwise(compiled.grad, eager.grad)


def test_custom_operator_is_registered_properly():
    weight = random_codes(2, 24, 40)
    scale, x = random_scale(weight, (8, 16), 2), torch.randn(5, 40, requires_grad=True)
    # Not test_schema: it compares the inputs before and after, for which torch has no float8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.deepseek_kernels.fp8_weight_gemm.default
    torch.library.opcheck(operator, (x, weight, scale, torch.tensor([2, 4]), 8, 16, 2, False), test_utils=tests)
    arguments = (x[:, :12].detach(), weight[:1, :12], scale[:1, :2], None, 8, 16, 1, True)
    torch.library.opcheck(operator, arguments, test_utils=tests)


def test_meta_tensors_give_shapes():
    weight = random_codes(24, 40).to("meta")
    y = fp8_weight_gemm(torch.empty(2, 3, 40, dtype=torch.bfloat16, device="meta"), weight, torch.ones(1, 1).to("meta"))
    assert y.shape == (2, 3, 24) and y.dtype == torch.bfloat16


# Memory.


def peak_memory(action) -> int:
    """Bytes that are allocated at once while `action` runs, at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    # Not `profiler.events()`, which adds allocations and releases up into the operators that made them.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_memory_is_measured():
    def action():
        first = torch.ones(1000)
        second = first + first
        del first
        return second + second

    assert peak_memory(action) == 8000


@pytest.mark.parametrize("rows", [1, MANY])
@pytest.mark.parametrize("code", [0x01, 0x7F])
def test_memory_is_that_of_a_tile_not_of_the_weight(rows, code):
    """Per code of a tile: 2 + 4 bytes, and 3 more to look for a NaN where there is one.

    The rest is activations: float32 copies and products with scales of what comes in, results before their rounding.
    """
    weight = random_codes(2048, 1024)
    weight.view(torch.uint8)[3, 3] = code
    scale = random_scale(weight, (64, 64))
    x = torch.randn(rows, 1024, requires_grad=True)

    def step():
        y = fp8_weight_gemm(x, weight, scale, (64, 64))
        y.backward(torch.ones_like(y))

    limit = 9 * weight.numel() / 8 + 3 * 4 * (rows + 1) * (1024 + 2048)
    assert limit < 2 * weight.numel()  # a bfloat16 copy
    assert peak_memory(step) < limit


# What users do wrong.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, s: fp8_weight_gemm(x, w[0], s), r"weight \[N, K\], got \[2, 9\] and \[9\]"),
        (lambda x, w, s: fp8_weight_gemm(x[:, 1:], w, s), r"x \[..., 9\] in .* got torch.float32 \[2, 8\]"),
        (lambda x, w, s: fp8_weight_gemm(x.double(), w, s), r"x \[..., 9\] in .* got torch.float64 \[2, 9\]"),
        (lambda x, w, s: fp8_weight_gemm(x, w.float(), s), r"float8_e4m3fn weight, got torch.float32"),
        (lambda x, w, s: fp8_weight_gemm(x, w, s, (128, 0)), r"two positive block sizes, got \(128, 0\)"),
        (
            lambda x, w, s: fp8_weight_gemm(x, w, s, (4, 4)),
            r"float32 scales \[2, 3\] for the weight \[6, 9\] in blocks of \[4, 4\], got torch.float32 \[1, 1\]",
        ),
        (lambda x, w, s: fp8_weight_gemm(x, w, s.double()), r"scales \[1, 1\] .* got torch.float64 \[1, 1\]"),
        (
            lambda x, w, s: fp8_weight_grouped_gemm(x, w[None], s[None], torch.tensor([1, 2])),
            r"ends \[E\], got \[2, 9\], \[1, 6, 9\] and \[2\]",
        ),
        (
            lambda x, w, s: fp8_weight_grouped_gemm(x, w[None], s[None], torch.tensor([2]), parts=4),
            r"parts that divides 6 rows, got 4",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 9), random_codes(6, 9), torch.ones(1, 1))
