"""Scores of the lightning indexer against the sum over heads in float64, in high precision and in FP8."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import hadamard_quantize, indexer_scores
from deepseek_kernels.attention.indexer_scores import reference
from deepseek_kernels.attention.packed_index_keys import pack_index_keys, packed_index_bytes, split_index_keys
from deepseek_kernels.common.masks import as_dense, causal_mask


def expected(q, keys, weights, mask) -> torch.Tensor:
    products = torch.einsum("btgd,bsd->btgs", q.double(), keys.double()).clamp(min=0)
    scores = torch.einsum("btg,btgs->bts", weights.double(), products)
    seen = causal_mask(q.shape[1], keys.shape[1]) if mask is None else as_dense(mask, keys.shape[1])
    return scores.masked_fill(~(seen[:, 0] if seen.ndim == 4 else seen), -torch.inf)


def assert_close(got, want, width: int, heads: int) -> None:
    """A sum of D products, then of G, whose terms may be G times the sum: each partial sum is rounded."""
    assert got.isneginf().equal(want.isneginf())
    seen, bound = ~want.isneginf(), 4 * (width + heads) * heads * torch.finfo(got.dtype).eps
    assert (got.double() - want)[seen].abs().max() <= bound * want[seen].abs().max()


def operands(batch, queries, heads, width, keys, dtype=torch.float32):
    q, k = torch.randn(batch, queries, heads, width).to(dtype), torch.randn(batch, keys, width).to(dtype)
    return q, k, torch.randn(batch, queries, heads, dtype=torch.promote_types(dtype, torch.float32))


def masks(batch, queries, keys):
    spans = torch.stack((torch.arange(queries) % 3, torch.arange(queries) + keys - queries + 1), -1).int()
    dense = torch.rand(batch, 1, queries, keys) < 0.7
    return None, spans.expand(batch, -1, -1), dense, dense[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys"),
    [(1, 1, 16, 70), (2, 9, 5, 9), (2, 7, 16, 41), (1, 5, 3, 3)],  # decoding, a prompt, a chunk, queries before keys
)
def test_equals_the_sum_over_heads(monkeypatch, dtype, small_tiles, batch, queries, heads, keys):
    if small_tiles:
        monkeypatch.setattr(reference, "_TRIPLES", 64)
        monkeypatch.setattr(reference, "_ROWS", 2 * batch * heads)
    q, k, weights = operands(batch, queries, heads, 24, keys, dtype)
    for mask in masks(batch, queries, keys):
        assert_close(indexer_scores(q, k, weights, mask), expected(q, k, weights, mask), 24, heads)


def test_scores_of_16_bit_operands_are_not_rounded():
    """Two keys whose scores differ by less than a unit of bfloat16 keep their order."""
    q, weights = torch.ones(1, 1, 16, 2, dtype=torch.bfloat16), torch.ones(1, 1, 16)
    keys = torch.tensor([[[256.0, 0.5], [256.0, 0.25]]], dtype=torch.bfloat16)
    first, second = indexer_scores(q, keys, weights, torch.ones(1, 2, dtype=torch.bool))[0, 0].tolist()
    assert (first, second) == (16 * 256.5, 16 * 256.25)


def test_rows_of_a_tile_are_few_for_many_queries(monkeypatch):
    """No tensor of queries x keys x heads: the largest product of a prompt is a tile."""
    sizes = []
    tile = reference._tile

    def watched(q, keys, weights):
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * keys.shape[-1])
        return tile(q, keys, weights)

    monkeypatch.setattr(reference, "_tile", watched)
    indexer_scores(*operands(1, 600, 16, 8, 600))
    assert max(sizes) <= reference._TRIPLES < 600 * 600 * 16
    assert sum(sizes) < 0.8 * 600 * 600 * 16  # tiles above the diagonal are passed over


def test_gradients():
    q, k, weights = (x.double().requires_grad_() for x in operands(2, 4, 3, 8, 6))
    mask = torch.rand(4, 6) < 0.8
    grad = torch.randn(2, 4, 6, dtype=torch.float64)
    seen = mask.expand(2, -1, -1)
    got = indexer_scores(q, k, weights, mask).masked_fill(~seen, 0)
    want = expected(q, k, weights, mask[None]).masked_fill(~seen, 0)
    for g, w in zip(
        torch.autograd.grad(got, (q, k, weights), grad), torch.autograd.grad(want, (q, k, weights), grad), strict=True
    ):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("width", [64, 128])
def test_fp8_scores_are_those_of_the_dequantized_operands(width):
    q, keys, weights = operands(2, 5, 16, width, 33, torch.bfloat16)
    codes, scale = hadamard_quantize(q.reshape(-1, width))
    packed = pack_index_keys(keys)
    assert packed.shape[-1] == packed_index_bytes(width) == width + 4
    weights = weights * scale.reshape(2, 5, 16)
    key_codes, key_scale = split_index_keys(packed, width)
    mask = torch.rand(2, 1, 5, 33) < 0.8
    got = indexer_scores(codes.reshape(q.shape), packed, weights, mask)
    want = expected(codes.reshape(q.shape).double(), key_codes.double() * key_scale.double(), weights, mask)
    assert_close(got, want, width, 16)


def test_packed_keys_are_dequantized_rotated_keys():
    keys = torch.randn(3, 7, 128, dtype=torch.bfloat16)
    codes, scale = hadamard_quantize(keys.reshape(-1, 128))
    got_codes, got_scale = split_index_keys(pack_index_keys(keys), 128)
    assert torch.equal(got_codes.view(torch.uint8).reshape(-1, 128), codes.view(torch.uint8))
    assert torch.equal(got_scale.reshape(-1, 1), scale)


def test_empty_operands():
    assert indexer_scores(*operands(1, 0, 2, 8, 3)).shape == (1, 0, 3)
    assert indexer_scores(*operands(2, 3, 2, 8, 0)).shape == (2, 3, 0)


def test_mistakes_are_named():
    q, keys, weights = operands(2, 3, 4, 8, 5)
    with pytest.raises(ValueError, match=r"q \[B, T, G, D\], got torch.float32 \[3, 4, 8\]"):
        indexer_scores(q[0], keys, weights)
    with pytest.raises(ValueError, match=r"keys torch.float32 \[2, S, 8\] .* got torch.bfloat16"):
        indexer_scores(q, keys.bfloat16(), weights)
    with pytest.raises(ValueError, match=r"keys torch.uint8 \[2, S, 12\] with torch.float8_e4m3fn queries"):
        indexer_scores(q.to(torch.float8_e4m3fn), keys, weights)
    with pytest.raises(ValueError, match=r"at most 128 values"):
        indexer_scores(torch.zeros(1, 1, 1, 256).to(torch.float8_e4m3fn), keys, weights)
    with pytest.raises(ValueError, match=r"weights torch.float32 \[2, 3, 4\], got torch.bfloat16"):
        indexer_scores(q, keys, weights.bfloat16())
    with pytest.raises(ValueError, match=r"spans\) or bool, got torch.float32"):
        indexer_scores(q, keys, weights, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"expected spans \[2, 3, 2\], got \[1, 3, 2\]"):
        indexer_scores(q, keys, weights, torch.zeros(1, 3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"a mask for all heads"):
        indexer_scores(q, keys, weights, torch.zeros(2, 2, 3, 5, dtype=torch.bool))
