"""Permutation by expert and weighted combination."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import permute, sort_by_expert, unpermute


def routing(tokens: int, experts: int, choices: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])


@pytest.mark.parametrize(
    ("tokens", "experts", "choices"),
    [(1, 4, 2), (13, 7, 3), (5, 3, 3)],
    ids=["one token", "prime sizes", "every expert chosen"],
)
def test_sort_is_a_stable_permutation(tokens, experts, choices):
    ids = routing(tokens, experts, choices)
    order, inverse, ends = sort_by_expert(ids, experts)
    assert torch.equal(order.sort().values, torch.arange(tokens * choices))
    assert torch.equal(order[inverse.flatten()], torch.arange(tokens * choices))
    for expert in range(experts):
        start = int(ends[expert - 1]) if expert else 0
        mine = order[start : int(ends[expert])]
        assert (ids.flatten()[mine] == expert).all()
        assert torch.equal(mine, mine.sort().values), "ties must stay in token order"


def test_choices_of_nobody_come_last():
    ids = torch.tensor([[0, 2], [2, 1]])  # expert 2 of 2: served elsewhere
    order, _, ends = sort_by_expert(ids, 2)
    assert ends.tolist() == [1, 2]
    assert order[2:].tolist() == [1, 2]


def test_round_trip_and_gradients_equal_plain_indexing():
    tokens, experts, choices = 9, 5, 3
    ids = routing(tokens, experts, choices)
    order, inverse, _ = sort_by_expert(ids, experts)
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, choices, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(experts, 6, dtype=torch.float64)  # expert e multiplies by scale[e]

    rows = permute(x, order, inverse)
    out = unpermute(rows * scale[ids.flatten()[order]], weights, order, inverse)
    expected = torch.stack(
        [sum(weights[t, k] * scale[ids[t, k]] * x[t] for k in range(choices)) for t in range(tokens)]
    )
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weights), grad)
    want = torch.autograd.grad(expected, (x, weights), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_gradcheck():
    ids = routing(4, 5, 2)
    order, inverse, _ = sort_by_expert(ids, 5)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: unpermute(permute(x, order, inverse), w, order, inverse), (x, weights))


def test_combination_accumulates_in_float32_and_rounds_once():
    """TRAPS C9: summed in bfloat16, ones stall at 256, where the next representable number is 258."""
    choices = 512
    ids = torch.arange(choices)[None]
    order, inverse, _ = sort_by_expert(ids, choices)
    y = torch.ones(choices, 1, dtype=torch.bfloat16)
    weights = torch.ones(1, choices)
    out = unpermute(y, weights, order, inverse)
    assert out.dtype == torch.bfloat16
    assert out.item() == 512
    stepwise = torch.zeros(1, dtype=torch.bfloat16)
    for k in range(choices):
        stepwise = stepwise + y[k]
    assert stepwise.item() == 256


def test_repeats_are_bitwise_equal():
    """TRAPS C14: no atomics, so the same input gives the same bits."""
    ids = routing(64, 8, 4)
    order, inverse, _ = sort_by_expert(ids, 8)
    y, weights = torch.randn(256, 16).bfloat16(), torch.rand(64, 4)
    first = unpermute(y, weights, order, inverse)
    assert all(torch.equal(first, unpermute(y, weights, order, inverse)) for _ in range(5))
