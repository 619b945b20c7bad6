"""Attention on selected keys against a float64 softmax over them, in high precision and packed."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import mla_decode, sparse_mla, topk_select
from deepseek_kernels.attention.packed_latents import pack, unpack
from deepseek_kernels.attention.sparse_mla import reference

RANK, ROTATED = 20, 8
WIDTH = RANK + ROTATED


def expected(q, states, ids, scale: float) -> torch.Tensor:
    out = torch.zeros(*q.shape[:3], RANK, dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            own = [s for s in ids[b, t].tolist() if s >= 0]
            if own:
                keys = states[b, own].double()
                weights = (q[b, t].double() @ keys.T * scale).softmax(-1)
                out[b, t] = weights @ keys[:, :RANK]
    return out


def selection(batch, queries, keys, top_k) -> torch.Tensor:
    """Causal, so that the first queries of a prompt have less than `top_k` keys."""
    return topk_select(torch.randn(batch, queries, keys), top_k)


def assert_close(got, want) -> None:
    """Outputs are convex combinations of values: rounding is relative to their size, with some for the exponentials."""
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys", "top_k"),
    [(1, 1, 4, 50, 9), (2, 1, 3, 50, 9), (2, 13, 4, 13, 5), (1, 6, 5, 31, 7), (1, 4, 2, 2, 7)],
)
def test_equals_a_float64_softmax(monkeypatch, dtype, small_blocks, batch, queries, heads, keys, top_k):
    if small_blocks:
        monkeypatch.setattr(reference, "_BYTES", 1)
    q, states = torch.randn(batch, queries, heads, WIDTH).to(dtype), torch.randn(batch, keys, WIDTH).to(dtype)
    ids = selection(batch, queries, keys, top_k)
    got = sparse_mla(q, states, ids, RANK, 0.3)
    assert got.dtype == dtype
    assert_close(got, expected(q, states, ids, 0.3))


def test_tokens_that_are_not_selected_are_not_read():
    q, states = torch.randn(2, 3, 2, WIDTH), torch.randn(2, 9, WIDTH)
    states[:, 0] = states[:, 4] = torch.nan
    ids = torch.tensor([[2, 3, 8], [1, -1, -1], [-1, -1, -1]], dtype=torch.int32).expand(2, -1, -1)
    out = sparse_mla(q, states, ids, RANK, 0.5)
    assert not out[:, 2].any()  # a query without keys
    assert_close(out, expected(q, states, ids, 0.5))


@pytest.mark.parametrize("keys", [17, 40])
def test_all_keys_selected_is_dense_attention(keys):
    """Up to `top_k` keys nothing is left out (TRAPS G4): the result is `mla_decode`'s."""
    q, states = torch.randn(2, 5, 3, WIDTH), torch.randn(2, keys, WIDTH)
    ids = topk_select(torch.randn(2, 5, keys), keys)
    assert_close(sparse_mla(q, states, ids, RANK, 0.3), mla_decode(q, states, RANK, 0.3).double())


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_states(batch):
    q, states = torch.randn(batch, 4, 3, WIDTH), torch.randn(batch, 33, WIDTH)
    packed = pack(states, RANK)
    ids = selection(batch, 4, 33, 6)
    want = torch.cat(unpack(packed, RANK, torch.float32), dim=-1)
    assert_close(sparse_mla(q, packed, ids, RANK, 0.3), expected(q, want, ids, 0.3))


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients(monkeypatch, small_blocks, batch):
    """Also where the keys are gathered again in the backward pass, block by block."""
    if small_blocks:
        monkeypatch.setattr(reference, "_BYTES", 1)
    q = torch.randn(batch, 7, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    states = torch.randn(batch, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    ids = selection(batch, 7, 7, 3)
    grad = torch.randn(batch, 7, 3, RANK, dtype=torch.float64)
    got = torch.autograd.grad(sparse_mla(q, states, ids, RANK, 0.3), (q, states), grad)
    want = torch.autograd.grad(expected(q, states, ids, 0.3), (q, states), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_the_cost_of_a_query_does_not_depend_on_the_keys(monkeypatch):
    seen = []

    def watched(q, states, *others):
        seen.append(states.shape[1])
        return mla_decode(q, states, *others)

    monkeypatch.setattr(reference, "mla_decode", watched)
    for keys in (40, 4000):
        sparse_mla(torch.randn(1, 1, 2, WIDTH), torch.randn(1, keys, WIDTH), selection(1, 1, keys, 16), RANK, 0.3)
    assert seen == [16, 16]


def test_empty_operands_and_mistakes():
    q, states, ids = torch.zeros(1, 2, 3, WIDTH), torch.zeros(1, 5, WIDTH), torch.zeros(1, 2, 4, dtype=torch.int32)
    assert not sparse_mla(q, states, ids[..., :0], RANK, 1.0).any()
    assert sparse_mla(q[:, :0], states, ids[:, :0], RANK, 1.0).shape == (1, 0, 3, RANK)
    with pytest.raises(ValueError, match=r"for a latent of 28, got \[1, 2, 3, 28\]"):
        sparse_mla(q, states, ids, WIDTH, 1.0)
    with pytest.raises(ValueError, match=r"states \[1, S, 28\] or uint8 \[1, S, 40\], got torch.float32 \[2, 5, 28\]"):
        sparse_mla(q, states.expand(2, -1, -1), ids, RANK, 1.0)
    with pytest.raises(ValueError, match=r"of one dtype, got torch.float32 and torch.bfloat16"):
        sparse_mla(q, states.bfloat16(), ids, RANK, 1.0)
    with pytest.raises(ValueError, match=r"ids int32 \[1, 2, K\], got torch.int64"):
        sparse_mla(q, states, ids.long(), RANK, 1.0)
