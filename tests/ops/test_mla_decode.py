"""Absorbed attention of few queries against a float64 softmax."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import mla_decode
from deepseek_kernels.mla_decode import reference

WIDTH = 24  # D


def expected(q: torch.Tensor, states: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    scores = torch.einsum("btnd,bsd->bnts", q.double(), states.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0)  # a row that attends to nothing
    return torch.einsum("bnts,bsd->btnd", weights, states.double())


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Outputs are convex combinations of values: rounding is relative to their size, with some for the exponentials."""
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys"),
    [
        (1, 1, 4, 1),  # the first token
        (2, 1, 5, 33),
        (1, 3, 4, 17),  # heads and queries in the rows of one product
        (1, 17, 3, 40),  # more queries: heads stay heads
    ],
)
def test_equals_a_float64_softmax(dtype, batch, queries, heads, keys):
    q = torch.randn(batch, queries, heads, WIDTH, dtype=dtype)
    states = torch.randn(batch, keys, WIDTH, dtype=dtype)
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    per_row = causal.expand(batch, 1, -1, -1).clone()
    per_row[-1, ..., 0] = keys == 1  # one row of the batch does not see its first key
    for mask in (None, causal, per_row, torch.where(causal, 0.0, -1e4).to(dtype)):
        assert_close(mla_decode(q, states, 0.3, mask), expected(q, states, 0.3, mask))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("keys", [8, 11])
def test_keys_in_parts_equal_keys_at_once(monkeypatch, threads, keys):
    """Each thread takes a part of the keys; what does not divide is a part of its own."""
    monkeypatch.setattr(reference, "_PART", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    buffer = torch.full((1, keys + 5, WIDTH), float("nan"))  # a cache with room: nothing behind the keys may leak in
    buffer[:, :keys] = torch.randn(1, keys, WIDTH)
    q, states = torch.randn(1, 1, 4, WIDTH), buffer[:, :keys]
    assert reference._parts(q.reshape(1, 1, 4, WIDTH), states, None) == min(threads, keys // 3) > 1
    assert_close(mla_decode(q, states, 0.5), expected(q, states, 0.5, None))


def test_a_row_that_attends_to_nothing_gives_zeros():
    q, states = torch.randn(1, 2, 3, WIDTH), torch.randn(1, 4, WIDTH)
    mask = torch.tensor([[False] * 4, [True] * 4])
    out = mla_decode(q, states, 1.0, mask)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    assert_close(out, expected(q, states, 1.0, mask))


def test_gradients():
    q = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    states = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(q)
    got = torch.autograd.grad(mla_decode(q, states, 0.3), (q, states), grad)
    scores = torch.einsum("btnd,bsd->bnts", q, states) * 0.3
    want = torch.autograd.grad(torch.einsum("bnts,bsd->btnd", scores.softmax(-1), states), (q, states), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("q", "states", "mask", "words"),
    [
        ((1, 1, 2, 8), (1, 4, 9), None, r"states \[B, S, D\]"),
        ((2, 1, 2, 8), (1, 4, 8), None, r"states \[B, S, D\]"),
        ((1, 1, 2, 8), (1, 4, 8), (1, 2, 1, 4), "a mask for all heads"),
    ],
)
def test_mistakes_are_named(q, states, mask, words):
    with pytest.raises(ValueError, match=words):
        mla_decode(torch.ones(q), torch.ones(states), 1.0, None if mask is None else torch.ones(mask))
