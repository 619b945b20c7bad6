"""Rows of expert parallelism: expected numbers against enumeration, counted numbers against a plain loop."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_arch as da
from deepseek_arch.planning.routing import count_rows, even_parts, expected_targets
from support import small_models

V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")


def enumerate_targets(config, sizes) -> float:
    """Mean over every allowed choice, one by one."""
    owner = [run for run, size in enumerate(sizes) for _ in range(size)]
    limited = config.topk_method != "greedy"
    groups, taken = (config.n_group, config.topk_group) if limited else (1, 1)
    size = config.n_routed_experts // groups
    counts = []
    for chosen_groups in itertools.combinations(range(groups), taken):
        experts = [g * size + i for g in chosen_groups for i in range(size)]
        counts += [len({owner[e] for e in c}) for c in itertools.combinations(experts, config.num_experts_per_tok)]
    return sum(counts) / len(counts)


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite", "kimi"])
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8, (3, 5), (1, 6, 1), (2, 3, 3)])
def test_expected_targets_equal_the_mean_over_all_choices(kind, sizes):
    config = small_models.config(kind)
    assert expected_targets(config, sizes) == pytest.approx(enumerate_targets(config, sizes), rel=1e-12)


def test_deepseek_v3_sends_a_token_to_few_nodes():
    """A simulation of 4,000 tokens gave 7.36 ranks and 3.17 other nodes (EP64 over 8 nodes)."""
    assert expected_targets(V3, even_parts(256, 64)) == pytest.approx(7.36, abs=0.03)
    nodes = expected_targets(V3, even_parts(256, 8))
    assert nodes * 7 / 8 == pytest.approx(3.17, abs=0.02)
    assert nodes < V3.topk_group
    unlimited = V3.replace(n_group=1, topk_group=1)
    assert expected_targets(unlimited, even_parts(256, 8)) > 5


@given(st.integers(1, 8), st.integers(1, 8))
def test_more_parts_never_have_fewer_targets(a, b):
    few, many = sorted((a, b))
    one, other = (expected_targets(V3, even_parts(256, 2**n)) for n in (few, many))
    assert 1 <= one <= other <= V3.num_experts_per_tok


@given(st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), max_size=12), st.sampled_from([1, 2, 4, 8]))
def test_counted_rows_equal_a_plain_loop(choices, ranks):
    per_rank = 8 // ranks
    pairs = {(token, e // per_rank) for token, ids in enumerate(choices) for e in ids if e < 8}
    assert count_rows(choices, 8, ranks) == [sum(at == rank for _, at in pairs) for rank in range(ranks)]
    by_choice = [sum(e // per_rank == rank for ids in choices for e in ids if e < 8) for rank in range(ranks)]
    assert count_rows(choices, 8, ranks, per_choice=True) == by_choice


@given(st.integers(1, 300), st.integers(1, 70))
def test_even_parts_cover_all_experts(experts, parts):
    sizes = even_parts(experts, parts)
    assert sum(sizes) == experts and max(sizes) - min(sizes) <= 1


def test_runs_must_cover_all_experts():
    with pytest.raises(ValueError, match="expected runs of 256 experts in all, got 255"):
        expected_targets(V3, (255,))
