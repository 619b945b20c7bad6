"""The C++ operators that select keys: scores against float64, the selection against the reference bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_kernels import hadamard_quantize, indexer_scores, topk_select, use_backend
from deepseek_kernels.attention.packed_index_keys import pack_index_keys, split_index_keys
from deepseek_kernels.common.masks import as_dense, causal_mask
from deepseek_kernels.testing.numeric import assert_bitwise
from support.cpu_operators import cpu_instructions, on_two_threads


@pytest.fixture(params=["native", "portable"], autouse=True)
def instructions(request, cpu_backend) -> Iterator[None]:
    with cpu_instructions(request.param):
        yield


def masks(batch: int, queries: int, keys: int) -> tuple[Tensor | None, ...]:
    first = torch.randint(-3, keys, (batch, queries))
    spans = torch.stack((first, first + torch.randint(-1, keys, (batch, queries))), -1).int()
    dense = torch.rand(batch, 1, queries, keys) < 0.6
    return None, spans, dense, dense[0, 0], dense[:, :, :1], dense[..., :1]


def seen_by(mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor:
    dense = causal_mask(queries, keys) if mask is None else as_dense(mask, keys)
    dense = dense[None, None] if dense.ndim == 2 else dense
    return dense.expand(batch, 1, queries, keys)[:, 0]


def assert_scores(got: Tensor, q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> None:
    """A sum of D products, then of G, whose terms may be G times the sum: each partial sum is rounded."""
    products = torch.einsum("btgd,bsd->btgs", q.double(), keys.double()).clamp(min=0)
    want = torch.einsum("btg,btgs->bts", weights.double(), products)
    seen = seen_by(mask, *want.shape)
    assert got.isneginf().equal(~seen)
    bound = 4 * sum(q.shape[2:]) * q.shape[2] * torch.finfo(got.dtype).eps * want[seen].abs().max() if seen.any() else 0
    assert not seen.any() or (got.double() - want)[seen].abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "width", "keys"),
    [(1, 1, 16, 24, 70), (2, 9, 5, 7, 9), (1, 70, 3, 128, 140), (1, 5, 64, 1, 3)],
)
def test_scores(dtype, batch, queries, heads, width, keys):
    q, k = torch.randn(batch, queries, heads, width).to(dtype), torch.randn(batch, keys, width).to(dtype)
    weights = torch.randn(batch, queries, heads)
    for mask in masks(batch, queries, keys):
        got = indexer_scores(q, k, weights, mask)
        assert_scores(got, q, k, weights, mask)
        assert_bitwise(on_two_threads(lambda m=mask: indexer_scores(q, k, weights, m)), got)


@pytest.mark.parametrize("width", [64, 128])
def test_scores_in_fp8(width):
    q, keys, weights = torch.randn(2, 5, 16, width), torch.randn(2, 133, width), torch.randn(2, 5, 16)
    codes, scale = hadamard_quantize(q.bfloat16().reshape(-1, width))
    packed = pack_index_keys(keys.bfloat16())
    weights, codes = weights * scale.reshape(2, 5, 16), codes.reshape(q.shape)
    key_codes, key_scale = split_index_keys(packed, width)
    for mask in masks(2, 5, 133):
        got = indexer_scores(codes, packed, weights, mask)
        assert_scores(got, codes.double(), key_codes.double() * key_scale.double(), weights, mask)


def test_scores_of_16_bit_operands_are_not_rounded():
    q, weights = torch.ones(1, 1, 16, 2, dtype=torch.bfloat16), torch.ones(1, 1, 16)
    keys = torch.tensor([[[256.0, 0.5], [256.0, 0.25]]], dtype=torch.bfloat16)
    scores = indexer_scores(q, keys, weights, torch.ones(1, 2, dtype=torch.bool))
    assert scores[0, 0].tolist() == [16 * 256.5, 16 * 256.25]


def test_scores_that_are_not_numbers():
    """One of a key that is seen, and none of one that is not."""
    q, keys, weights = torch.randn(1, 3, 4, 8), torch.randn(1, 90, 8), torch.rand(1, 3, 4)
    keys[0, 5] = keys[0, 80] = torch.nan
    mask = torch.ones(3, 90, dtype=torch.bool)
    mask[:, 80] = False
    scores = indexer_scores(q, keys, weights, mask)
    assert scores[..., 5].isnan().all() and scores[..., 80].isneginf().all() and scores.isnan().sum() == 3


def test_keys_of_a_wider_cache():
    q, keys, weights = torch.randn(1, 3, 4, 8), torch.randn(1, 90, 20)[..., :8], torch.rand(1, 3, 4)
    assert_bitwise(indexer_scores(q, keys, weights), indexer_scores(q, keys.contiguous(), weights))


# The selection.


def assert_selected(scores: Tensor, top_k: int, mask: Tensor | None) -> None:
    got = topk_select(scores, top_k, mask)
    with use_backend("reference"):
        assert_bitwise(got, topk_select(scores, top_k, mask), strides=False)
    assert_bitwise(on_two_threads(lambda: topk_select(scores, top_k, mask)), got)


KINDS = {
    "normal": lambda x: x,
    "ties": lambda x: x.round(),
    "all equal": lambda x: x * 0,
    "close": lambda x: 1 + x * 2.0**-22,
    "tiny and huge": lambda x: x * 10 ** (30 * x),
    "not finite": lambda x: torch.where(x > 1, torch.nan, torch.where(x > 0.5, torch.inf, x)).masked_fill(
        x < -1, -torch.inf
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 40), (2, 19, 19), (2, 5, 230), (1, 6, 4)])
def test_selection(kind, batch, queries, keys):
    scores = KINDS[kind](torch.randn(batch, queries, keys))
    for mask in masks(batch, queries, keys):
        for top_k in (1, 3, 7, 64):
            assert_selected(scores, top_k, mask)


def test_selection_of_a_long_prompt():
    scores = torch.randn(1, 8, 5000).relu()  # half of them are equal
    assert_selected(scores, 2048, None)
    assert_selected(scores, 2600, None)


def test_scores_in_any_layout():
    scores = torch.randn(2, 90, 7)
    assert_selected(scores.transpose(1, 2), 5, None)
    assert_selected(torch.zeros(1, 1, 1).expand(2, 7, 90), 100, None)
