"""An error of one rank while ranks decode together is raised on all of them (TRAPS S4)."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support import small_models
from support.ranks import run_ranks

CONFIG = small_models.config("v3", num_attention_heads=4, vocab_size=64, num_nextn_predict_layers=1)
IDS = small_models.tokens(CONFIG, 2, 6)


def outcome(rank, axes, options):
    """Error of a rank that continues with options of its own, and the number of tokens that were handed out."""
    model = da.parallelize(small_models.model(CONFIG), ParallelLayout(**axes))
    handed = []

    def callback(tokens):
        handed.append(tokens)
        if rank == 1 and len(handed) == options[1].get("fails_at"):
            raise KeyError("the callback")

    given = {name: value for name, value in options[rank].items() if name != "fails_at"}
    if options[1].get("fails_at"):
        given["callback"] = callback
    try:
        da.generate(model, IDS, **({"max_new_tokens": 6, "eos_token_id": []} | given))
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(handed)
    return None, len(handed)


LAYOUTS = [{"tp": 2}, {"dp_shard": 2, "ep": 2}]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_what_a_callback_raises(axes, depth):
    options = [{"mtp_depth": depth}, {"mtp_depth": depth, "fails_at": 2}]
    first, second = run_ranks(outcome, 2, axes, options, seconds=40)
    assert second == ("KeyError: 'the callback'", 2)
    assert first[0] == "RuntimeError: KeyError: 'the callback'" and first[1] <= 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([{}, {"temperature": -1.0}], "expected a finite temperature >= 0, got -1.0"),
        ([{}, {"max_new_tokens": 0}], "expected the same truth of max_new_tokens > 0 on all ranks, got [True, False]"),
        ([{"seed": 1}, {}], "expected a seed on all ranks or on none, got [1, None]"),
        ([{}, {"record_routing": True}], "expected the same record_routing on all ranks, got [False, True]"),
        ([{}, {"mtp_depth": 1}], "expected the same mtp_depth on all ranks, got [0, 1]"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together(options, text):
    for raised, _ in run_ranks(outcome, 2, {"dp_shard": 2, "ep": 2}, options, seconds=40):
        assert raised == f"ValueError: {text}"


def test_seeds_of_ranks_that_compute_parts_of_the_same_logits():
    options = [{"seed": 1, "temperature": 1.0}, {"seed": 2, "temperature": 1.0}]
    for raised, _ in run_ranks(outcome, 2, {"tp": 2}, options, seconds=40):
        assert "expected the same seed on ranks that compute parts of the same logits, got [1, 2]" in raised
    assert run_ranks(outcome, 2, {"dp_shard": 2, "ep": 2}, options, seconds=40) == [(None, 0), (None, 0)]


def not_finite(rank, depth):
    """Rank 1 alone reads NaN from the embedding."""
    model = da.parallelize(small_models.model(CONFIG), ParallelLayout(dp_shard=2, ep=2))
    ids = IDS
    if rank == 1:
        model.model.embed_tokens.register_forward_hook(lambda *given: torch.full_like(given[-1], float("nan")))
    try:
        da.generate(model, ids, max_new_tokens=4, mtp_depth=depth, eos_token_id=[])
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("depth", [0, 1])
def test_logits_that_are_not_finite(depth):
    first, second = run_ranks(not_finite, 2, depth, seconds=40)
    assert first == second and first.startswith("expected finite logits")
