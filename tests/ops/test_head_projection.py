"""Projections by one matrix for each head against float64, on the reference and in C++."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepseek_kernels import dequantize_blocks, quantize_blocks, use_backend
from deepseek_kernels.attention.head_projection import cpu, latents_to_values, queries_to_latents, reads_codes
from deepseek_kernels.testing.numeric import assert_bitwise
from support.cpu_operators import cpu_instructions, on_two_threads

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["reference", "native", "portable"], autouse=True)
def backend(request) -> Iterator[str]:
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
        return
    request.getfixturevalue("cpu_backend")
    with cpu_instructions(request.param):
        yield request.param


def assert_product(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """A sum in float32, in any order, rounded to the operands' dtype; those of both are exact in float64."""
    want = torch.einsum("btnk,nkm->btnm", x.double(), weight.double())
    terms = torch.einsum("btnk,nkm->btnm", x.double().abs(), weight.double().abs())
    bound = x.shape[-1] * EPS * terms + torch.finfo(got.dtype).eps * want.abs() + 1e-30
    assert got.dtype == x.dtype and ((got.double() - want).abs() <= bound).all()


SHAPES = [  # batch, queries, heads, P, R, V, C
    (1, 1, 16, 128, 64, 128, 512),
    (2, 2, 3, 5, 3, 7, 33),
    (8, 1, 2, 16, 8, 16, 100),
    (1, 3, 1, 1, 0, 1, 1),
    (1, 5, 2, 6, 4, 0, 40),
    (3, 5, 2, 6, 4, 9, 40),  # more rows than the C++ is made for
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "queries", "heads", "own", "rotated", "values", "latent"), SHAPES)
def test_products(backend, dtype, batch, queries, heads, own, rotated, values, latent):
    q, up = torch.randn(batch, queries, heads, own + rotated).to(dtype), torch.randn(heads, own + values, latent)
    up, latents = up.to(dtype), torch.randn(batch, queries, heads, latent).to(dtype)
    assert cpu.takes(q, up) == (batch * queries <= 8)
    got = queries_to_latents(q, up, own)
    assert_bitwise(got[..., latent:], q[..., own:], strides=False)
    assert_product(got[..., :latent], q[..., :own], up[:, :own])
    assert_product(latents_to_values(latents, up, own), latents, up[:, own:].mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_threads_do_not_matter(backend, dtype):
    if backend == "reference":
        pytest.skip("the built-in product's sums depend on the number of rows")
    q, up, latents = torch.randn(7, 1, 3, 20), torch.randn(3, 28, 70), torch.randn(7, 1, 3, 70)
    q, up, latents = q.to(dtype), up.to(dtype), latents.to(dtype)
    for run, x in ((queries_to_latents, q), (latents_to_values, latents)):
        together = run(x, up, 16)
        assert_bitwise(torch.cat([run(x[i : i + 1], up, 16) for i in range(7)]), together)
        assert_bitwise(on_two_threads(lambda run=run, x=x: run(x, up, 16)), together)
        assert_bitwise(run(x.transpose(0, 1).contiguous().transpose(0, 1), up, 16), together)


# ---------------------------------------------------------------- matrices in FP8

BLOCKS = [(128, 128), (16, 12), (3, 64), (1000, 1000)]  # heads need not end where blocks do


def quantized(heads: int, rows: int, latent: int, blocks: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize_blocks(torch.randn(heads * rows, latent), blocks)
    return codes.view(heads, rows, latent), scale * (1 + torch.rand(scale.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("batch", "queries", "heads", "own", "rotated", "values", "latent"), SHAPES)
def test_products_of_fp8_values(backend, dtype, blocks, batch, queries, heads, own, rotated, values, latent):
    q = torch.randn(batch, queries, heads, own + rotated).to(dtype)
    latents = torch.randn(batch, queries, heads, latent).to(dtype)
    codes, scale = quantized(heads, own + values, latent, blocks)
    in_cpp = backend != "reference" and batch * queries <= 8
    assert reads_codes(q, codes) == reads_codes(latents, codes) == in_cpp
    # The reference rounds the matrix to the activations' dtype; in C++ it is exact in float32 but for one rounding.
    up = dequantize_blocks(codes.flatten(0, 1), scale, blocks, torch.float32 if in_cpp else dtype).view(codes.shape)
    got = queries_to_latents(q, codes, own, scale, blocks)
    assert_bitwise(got[..., latent:], q[..., own:], strides=False)
    assert_product(got[..., :latent], q[..., :own], up[:, :own])
    assert_product(latents_to_values(latents, codes, own, scale, blocks), latents, up[:, own:].mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("latent", [64, 40])
def test_every_fp8_value_is_read_exactly(backend, dtype, latent):
    """Each of the 256 values alone in a head, where it meets a one: subnormal numbers, zeros and NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 2, latent).contiguous()
    codes, scale = codes.view(torch.float8_e4m3fn), torch.ones(512, 1)
    want = codes[:, 0].to(dtype)  # by torch's own conversion
    got = queries_to_latents(torch.ones(1, 1, 256, 1, dtype=dtype), codes, 1, scale, (1, latent))
    torch.testing.assert_close(got[0, 0], want, rtol=0, atol=0, equal_nan=True)
    one = torch.zeros(1, 1, 256, latent, dtype=dtype)
    one[..., -1] = 1
    finite = codes.float().isfinite()[:, 1, :1]
    got = latents_to_values(one, codes, 1, scale, (1, latent))[0, 0]
    torch.testing.assert_close(got[finite], want[:, :1][finite], rtol=0, atol=0)
    assert got[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_threads_do_not_matter_for_fp8_values(backend, dtype):
    if backend == "reference":
        pytest.skip("the built-in product's sums depend on the number of rows")
    q, latents = torch.randn(7, 1, 3, 20).to(dtype), torch.randn(7, 1, 3, 140).to(dtype)
    grid = quantized(3, 28, 140, (16, 64))
    for run, x in ((queries_to_latents, q), (latents_to_values, latents)):
        together = run(x, grid[0], 16, grid[1], (16, 64))
        rows = [run(x[i : i + 1], grid[0], 16, grid[1], (16, 64)) for i in range(7)]
        assert_bitwise(torch.cat(rows), together)
        assert_bitwise(on_two_threads(lambda run=run, x=x: run(x, grid[0], 16, grid[1], (16, 64))), together)


def test_scales_that_do_not_fit():
    q, codes = torch.zeros(1, 2, 3, 7), torch.zeros(3, 9, 11).to(torch.float8_e4m3fn)
    expected = r"expected a float8_e4m3fn up and float32 scales \[4, 2\] for its blocks of \[8, 8\], got "
    with pytest.raises(ValueError, match=expected + r"torch.float8_e4m3fn and torch.float32 \[3, 2\]"):
        queries_to_latents(q, codes, 5, torch.ones(3, 2), (8, 8))
    with pytest.raises(ValueError, match=expected + r"torch.float32 and torch.float32 \[4, 2\]"):
        latents_to_values(torch.zeros(1, 2, 3, 11), codes.float(), 5, torch.ones(4, 2), (8, 8))


# ---------------------------------------------------------------- derivatives, mistakes


def test_gradients():
    q, up = torch.randn(1, 2, 3, 7, requires_grad=True), torch.randn(3, 9, 11, requires_grad=True)
    assert not cpu.takes(q, up)
    out = latents_to_values(queries_to_latents(q, up, 5)[..., :11], up, 5)
    latent = torch.einsum("btnp,npc->btnc", q[..., :5], up[:, :5])
    want = torch.einsum("btnc,nvc->btnv", latent, up[:, 5:])
    grad = torch.randn_like(out)
    for got, right in zip(
        torch.autograd.grad(out, (q, up), grad), torch.autograd.grad(want, (q, up), grad), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_mistakes():
    q, up = torch.zeros(1, 2, 3, 7), torch.zeros(3, 9, 11)
    with pytest.raises(ValueError, match=r"expected q \[B, T, N, P \+ R\] and up .* for 8 features of a key, got \["):
        queries_to_latents(q, up, 8)
    with pytest.raises(ValueError, match=r"expected latents \[B, T, N, C\] and up \[N, P \+ V, C\]"):
        latents_to_values(q, up, 5)
    with pytest.raises(ValueError, match=r"got \[1, 2, 3, 7\] and \[4, 9, 11\]"):
        queries_to_latents(q, torch.zeros(4, 9, 11), 5)
