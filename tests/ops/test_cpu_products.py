"""The C++ products of few and of some more rows, with and without FP8 weights and AVX512-BF16, against float64.

Bounds follow each rounding: a sum of n products in float32, in any order, errs by n * eps * sum(|terms|); scales add
two roundings to each term; the result is rounded to the activations' dtype. AVX512-BF16 takes subnormal numbers for
zeros.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import dense_gemm, dequantize_blocks, fp8_weight_gemm
from deepseek_kernels.testing.numeric import assert_bitwise
from support.cpu_operators import cpu_instructions, on_two_threads

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
DTYPES = [torch.bfloat16, torch.float32]
# Rows: one, several of the loops' sizes, all that there are. Columns: fewer than a vector, no multiple of one, many.
SHAPES = [(1, 1, 1), (1, 33, 100), (2, 6, 64), (3, 130, 200), (5, 7, 31), (7, 66, 257), (8, 129, 1408)]
# More rows than a few, which only dense products have: tiles of all sizes, blocks of columns.
MANY = [(9, 1, 1), (10, 6, 31), (11, 127, 200), (12, 11, 1025), (15, 10, 2100), (29, 250, 33), (32, 4, 4096)]


@pytest.fixture(params=["native", "portable"], autouse=True)
def instructions(request, cpu_backend):
    """Both kinds of instructions, where the CPU has both."""
    with cpu_instructions(request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the C++ operators that are called."""
    seen: list[str] = []
    for name in ("dense", "fp8_weight"):
        operator = getattr(torch.ops.deepseek_kernels_cpu, name)
        monkeypatch.setattr(
            torch.ops.deepseek_kernels_cpu, name, lambda *a, n=name, o=operator: seen.append(n) or o(*a), raising=False
        )
    return seen


def assert_product(got: Tensor, x: Tensor, weight: Tensor) -> None:
    """`got` is x [M, K] times weight [N, K] transposed, which is given in float64."""
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    info = torch.finfo(got.dtype)
    bound = (x.shape[1] + 2) * EPS * terms + info.eps / 2 * exact.abs() + x.shape[1] * TINY
    assert (got.shape, got.dtype) == (exact.shape, x.dtype)
    worst = ((got.double() - exact).abs() - bound).max()
    assert worst <= 0, f"exceeds the bound by {worst:.3g}"  # also where it is NaN


def inside(x: Tensor) -> Tensor:
    """The same values in the middle of a matrix of NaN: whoever reads beyond them shows it."""
    rows, columns = x.shape
    wide = torch.full((rows + 2, columns), torch.nan).to(x.dtype)
    wide[1:-1] = x
    return wide[1:-1]


def random_codes(*shape: int) -> Tensor:
    """Every code but NaN."""
    codes = torch.randint(0, 254, shape, dtype=torch.uint8)
    return torch.where(codes >= 127, codes + 1, codes).view(torch.float8_e4m3fn)


def random_scale(weight: Tensor, block_size: tuple[int, int]) -> Tensor:
    grid = [-(-size // block) for size, block in zip(weight.shape, block_size, strict=True)]
    return 2.0 ** torch.randint(-8, 8, grid) * (1 + torch.rand(grid))


def dequantized(weight: Tensor, scale: Tensor, block_size: tuple[int, int]) -> Tensor:
    wide = scale.double().repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return weight.double() * wide[: weight.shape[0], : weight.shape[1]]


# Dense.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_dense(calls, dtype, rows, outputs, columns):
    x, weight = inside(torch.randn(rows, columns).to(dtype)), inside(torch.randn(outputs, columns).to(dtype))
    assert_product(dense_gemm(x, weight), x, weight.double())
    assert calls == ["dense"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "columns"), MANY)
def test_dense_of_many_rows(calls, instructions, dtype, rows, outputs, columns):
    x, weight = inside(torch.randn(rows, columns).to(dtype)), inside(torch.randn(outputs, columns).to(dtype))
    got = dense_gemm(x, weight)
    assert_product(got, x, weight.double())
    ours = dtype == torch.float32 or instructions == "native"
    assert calls == ["dense"] * ours
    if ours:
        assert_bitwise(got, torch.cat([dense_gemm(row, weight) for row in x.split(5)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_many_depends_on_nothing_but_itself(instructions, dtype):
    if dtype == torch.bfloat16 and instructions != "native":
        pytest.skip("many rows of bfloat16 are the built-in product's")
    x, weight = torch.randn(30, 1500).to(dtype), torch.randn(260, 1500).to(dtype)
    together = dense_gemm(x, weight)
    own = torch.arange(30) % 3 != 1
    x[~own] = torch.nan
    assert dense_gemm(x, weight)[~own].isnan().all()
    assert_bitwise(dense_gemm(x, weight)[own], together[own])
    assert_bitwise(on_two_threads(lambda: dense_gemm(x, weight))[own], together[own])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_of_any_layout_of_activations(dtype):
    x, weight = torch.randn(2, 3, 90).to(dtype), torch.randn(40, 90).to(dtype)
    plain = dense_gemm(x, weight)
    assert plain.shape == (2, 3, 40)
    wide = torch.stack([x, x], -1)[..., 0]
    for other in (wide, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_bitwise(dense_gemm(other, weight), plain, strides=False)
    assert_bitwise(dense_gemm(x[0, 0], weight), plain[0, 0], strides=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_come_out_exactly(dtype):
    """Sums below 2^8 are exact in every dtype, so that one wrong column or row shows."""
    for rows in (8, 27):
        x, weight = (torch.randint(-1, 2, (count, 200)).to(dtype) for count in (rows, 50))
        assert_bitwise(dense_gemm(x, weight), (x.double() @ weight.double().T).to(dtype))


def test_what_is_not_for_it_is_the_built_in_s(calls):
    x, weight = torch.randn(8, 64), torch.randn(24, 64)
    leaf = x.clone().requires_grad_()
    assert dense_gemm(leaf, weight).requires_grad
    for others in ((torch.randn(65, 64), weight), (x, torch.randn(64, 24).T), (x.double(), weight.double())):
        torch.testing.assert_close(dense_gemm(*others), others[0] @ others[1].T)
    assert dense_gemm(x[:0], weight).shape == (0, 24)
    assert not calls
    with torch.no_grad():
        assert dense_gemm(leaf, weight).shape == (8, 24)
    assert calls == ["dense"]


# FP8 weights.


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_exact(rows, dtype):
    """Subnormals, both zeros' values, the largest, NaN: codes times one, at scale one."""
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    got = fp8_weight_gemm(torch.ones(rows, 1, dtype=dtype), weight, torch.ones(2, 1))
    expected = weight.float().T.expand(rows, 256)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [(128, 128), (32, 64), (1, 32), (16, 7)])
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_fp8_weight(calls, dtype, block_size, rows, outputs, columns):
    x = inside(torch.randn(rows, columns).to(dtype))
    weight = random_codes(outputs, columns)
    scale = random_scale(weight, block_size)
    assert_product(fp8_weight_gemm(x, weight, scale, block_size), x, dequantized(weight, scale, block_size))
    assert calls == ["fp8_weight"]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [(0, 0), (129, 259), (70, 131)])
def test_nan_code_spoils_its_row_and_nothing_else(code, place):
    weight, x = random_codes(130, 260), torch.randn(3, 260).bfloat16()
    scale = random_scale(weight, (128, 128))
    before = fp8_weight_gemm(x, weight, scale)
    weight.view(torch.uint8)[place] = code
    got = fp8_weight_gemm(x, weight, scale)
    outputs = torch.arange(130) == place[0]
    assert got[:, outputs].isnan().all()
    assert_bitwise(got[:, ~outputs], before[:, ~outputs], strides=False)


def test_dequantized_blocks_give_the_same():
    weight, x = random_codes(140, 300), torch.randn(4, 300)
    scale = random_scale(weight, (128, 128))
    assert_product(fp8_weight_gemm(x, weight, scale), x, dequantize_blocks(weight, scale, dtype=torch.float32).double())


# Both.


def product(kind: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, tuple]:
    """Activations, and what follows them in the call of `kind`."""
    x = torch.randn(rows, 520).to(dtype)
    if kind == "dense":
        return x, (torch.randn(300, 520).to(dtype),)
    weight = random_codes(300, 520)
    return x, (weight, random_scale(weight, (128, 128)))


CALLS = {"dense": dense_gemm, "fp8": fp8_weight_gemm}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_but_itself(kind, dtype):
    """Neither on how many rows there are, nor on what they hold, nor on the number of threads."""
    x, rest = product(kind, 8, dtype)
    alone = [CALLS[kind](x[i : i + 1], *rest) for i in range(8)]
    together = CALLS[kind](x, *rest)
    assert_bitwise(together, torch.cat(alone))
    x[[0, 2, 4, 5]] = torch.nan
    assert_bitwise(CALLS[kind](x, *rest)[[1, 3, 6, 7]], together[[1, 3, 6, 7]])
    assert_bitwise(on_two_threads(lambda: CALLS[kind](x, *rest))[[1, 3, 6, 7]], together[[1, 3, 6, 7]])


@pytest.mark.parametrize("kind", CALLS)
def test_compiled_gives_the_same(kind):
    torch.compiler.reset()
    compiled = torch.compile(CALLS[kind], fullgraph=True, backend="aot_eager")
    for rows in (1, 3, 8, 9):
        x, rest = product(kind, rows, torch.bfloat16)
        assert_bitwise(compiled(x, *rest), CALLS[kind](x, *rest))


@pytest.mark.parametrize("kind", CALLS)
def test_autocast_casts_the_activations(kind):
    x, rest = product(kind, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[kind](x, *rest)
    if kind == "dense":
        rest = (rest[0].bfloat16(),)
    assert_bitwise(got, CALLS[kind](x.bfloat16(), *rest))


def test_custom_operators_are_registered_properly():
    library = torch.ops.deepseek_kernels_cpu
    x, (weight, scale) = product("fp8", 3, torch.bfloat16)
    tests = ("test_faketensor", "test_aot_dispatch_static")  # not test_schema, which compares inputs: none for float8
    torch.library.opcheck(library.fp8_weight.default, (x, weight, scale, 128, 128), test_utils=tests)
    torch.library.opcheck(library.dense.default, (x, torch.randn(7, 520).bfloat16()))
