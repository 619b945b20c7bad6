"""The selection of keys against a sort of each row in Python, with ties, padding, packed documents, NaN."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_kernels import topk_select
from deepseek_kernels.attention.topk_select import reference
from deepseek_kernels.common.masks import as_dense, causal_mask


def expected(scores: torch.Tensor, top_k: int, mask: torch.Tensor | None) -> torch.Tensor:
    batch, queries, keys = scores.shape
    seen = causal_mask(queries, keys)[None, None] if mask is None else as_dense(mask, keys)
    seen = seen.expand(batch, 1, queries, keys)[:, 0]
    out = torch.full((batch, queries, min(top_k, keys)), -1, dtype=torch.int32)
    for b in range(batch):
        for t in range(queries):
            candidates = [s for s in range(keys) if seen[b, t, s]]
            value = {s: float(scores[b, t, s]) for s in candidates}
            value = {s: math.inf if math.isnan(v) else v for s, v in value.items()}
            best = sorted(sorted(candidates, key=lambda s: (-value[s], s))[:top_k])
            out[b, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out


def masks(batch, queries, keys):
    ends = torch.arange(queries) + keys - queries + 1
    packed = torch.stack((ends // 5 * 5, ends), -1).int().expand(batch, -1, -1)  # documents of 5 tokens
    rows = packed.clone()
    rows[..., 0] = 0
    rows[-1, :, 1] -= 2  # one row of the batch is two tokens shorter
    hole = torch.rand(batch, 1, queries, keys) < 0.6
    return None, packed, rows, hole, hole[0, 0]


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 40), (2, 19, 19), (2, 5, 23), (1, 6, 4)])
def test_equals_a_sort_of_each_row(monkeypatch, small_blocks, ties, batch, queries, keys):
    if small_blocks:
        monkeypatch.setattr(reference, "_SCORES", 2 * keys)
    scores = torch.randn(batch, queries, keys)
    if ties:
        scores = scores.round()  # a few values, zeros of both signs among them
        assert (scores == 0).any() and scores.unique().numel() < 10
    for mask in masks(batch, queries, keys):
        for top_k in (1, 3, 7, 64):
            got = topk_select(scores, top_k, mask)
            assert got.dtype == torch.int32
            assert torch.equal(got, expected(scores, top_k, mask))


def test_ties_go_to_the_smaller_index_and_zeros_are_equal():
    scores = torch.tensor([[[0.0, 2.0, -0.0, 2.0, 0.0, 1.0]]])
    everything = torch.ones(1, 6, dtype=torch.bool)
    assert topk_select(scores, 4, everything)[0, 0].tolist() == [0, 1, 3, 5]
    assert topk_select(scores, 5, everything)[0, 0].tolist() == [0, 1, 2, 3, 5]


def test_unseen_keys_are_not_selected_whatever_their_score():
    scores = torch.tensor([[[torch.nan, torch.inf, 1.0, 5.0], [0.0, torch.inf, -torch.inf, torch.nan]]])
    spans = torch.tensor([[[2, 4], [0, 3]]], dtype=torch.int32)
    assert topk_select(scores, 3, spans)[0].tolist() == [[2, 3, -1], [0, 1, 2]]  # a seen key of -inf is one
    assert topk_select(scores, 1, spans)[0].tolist() == [[3], [1]]
    none = torch.zeros(1, 2, 2, dtype=torch.int32)
    assert topk_select(scores, 3, none)[0].tolist() == [[-1, -1, -1]] * 2


def test_nan_counts_as_infinity():
    scores = torch.tensor([[[1.0, torch.inf, torch.nan, 3.0]]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert topk_select(scores, 1, everything).tolist() == [[[1]]]
    assert topk_select(scores, 2, everything).tolist() == [[[1, 2]]]


def test_is_the_same_in_every_run():
    scores = torch.randn(1, 4, 500).round()
    first = topk_select(scores, 100)
    assert all(torch.equal(topk_select(scores, 100), first) for _ in range(20))


def test_empty_operands_and_mistakes():
    assert topk_select(torch.zeros(1, 0, 5), 3).shape == (1, 0, 3)
    assert topk_select(torch.zeros(1, 2, 0), 3).shape == (1, 2, 0)
    with pytest.raises(ValueError, match=r"scores \[B, T, S\], got torch.bfloat16"):
        topk_select(torch.zeros(1, 2, 3, dtype=torch.bfloat16), 3)
    with pytest.raises(ValueError, match="top_k >= 1, got 0"):
        topk_select(torch.zeros(1, 2, 3), 0)
    with pytest.raises(ValueError, match=r"spans\) or bool, got torch.float32"):
        topk_select(torch.zeros(1, 2, 3), 1, torch.zeros(2, 3))
