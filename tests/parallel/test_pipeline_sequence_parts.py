"""Pipelines of sequences that are cut over ranks: losses and gradients of one process, and checkpoints."""

from __future__ import annotations

import functools

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support import small_models
from support.cut_models import whole
from support.pipelines import MICRO, batch, check, expected_at_once, model_of
from support.ranks import run_ranks
from support.small_models import error

TOKENS = 16
AXES = {"pp": 2, "cp": 2}
WHOLE = functools.partial(batch, tokens=TOKENS)


@functools.cache
def expected():
    return expected_at_once(model_of, WHOLE(model_of().config))


@pytest.mark.parametrize(
    "schedules",
    [
        ["GPipe", "1F1B", "Interleaved1F1B"],
        ["ZBH1", "InterleavedZeroBubble"],
        ["ZBVZeroBubble", "DualPipeV"],
    ],
    ids=str,
)
def test_gradients_are_those_of_one_process(schedules):
    """Documents begin on one rank and end on another; padding on both sides; rows without a target."""
    check(AXES, 4, [{"schedule": name} for name in schedules], expected=expected(), make=WHOLE)


@pytest.mark.parametrize("schedule", ["1F1B", "DualPipeV"])
def test_experts_over_the_parts_and_recomputed_layers(schedule):
    check(AXES | {"ep": 2}, 4, {"schedule": schedule}, recompute=schedule == "1F1B", make=WHOLE)


def test_a_tied_head_and_two_mtp_modules():
    def build():
        return model_of("v2-lite", tie_word_embeddings=True, num_nextn_predict_layers=2)

    check(AXES, 4, [{"schedule": "1F1B"}, {"schedule": "ZBVZeroBubble"}], build, make=WHOLE)


def balanced(config, passes):
    """As many targets in every row: shares that float32 has exactly."""
    ids = small_models.tokens(config, 2 * passes, 8)
    labels = ids.clone()
    labels[:, [1, 5, 6]] = -100
    return {"input_ids": ids, "labels": labels}


def test_in_float64_to_its_rounding():
    """Dense layers: routers compute in float32, and their sums over tokens are in another order here."""

    def build():
        model = model_of(dtype=torch.float64, first_k_dense_replace=9)
        model.balance_loss = da.BalanceLoss()
        return model

    schedules = [{"schedule": "1F1B"}, {"schedule": "DualPipeV"}]
    alone = expected_at_once(build, balanced(build().config, MICRO))
    check(AXES, 4, schedules, build, torch.float64, expected=alone, make=balanced)


def on_parts(rank, folder):
    """Reads files, takes a step, and writes both kinds of checkpoint; a sequence of odd chunks changes nothing."""
    layout, ids = ParallelLayout(**AXES), small_models.tokens(model_of().config, 4, TOKENS)
    model = da.load(folder / "files", dtype=torch.float32, layout=layout, schedule="1F1B")
    pipe = da.pipeline(model.train(), layout, microbatches=2)
    with pytest.raises(ValueError) as caught:
        pipe.step(ids[:, :10], ids[:, :10])
    seen = pipe.evaluate(ids, ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipe.step(ids, ids, mtp_weight=0.3)
    optimizer.step()
    da.save(model, folder / "saved")
    da.save_sharded(model, folder / "sharded", optimizer)
    da.init_weights(model, seed=3)
    drawn = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    return [float(seen.loss), float(seen.mtp_loss)], drawn, str(caught.value)


def test_files_checkpoints_and_drawn_weights(tmp_path):
    whole_model = model_of()
    da.save(whole_model, tmp_path / "files")
    ids = small_models.tokens(whole_model.config, 4, TOKENS)
    out = whole_model(ids, labels=ids, return_logits=False)
    (out.loss + 0.3 * out.mtp_loss).backward()
    torch.optim.SGD(whole_model.parameters(), lr=0.1).step()
    found: dict = {}
    for losses, drawn, message in run_ranks(on_parts, 4, tmp_path):
        assert losses == pytest.approx([float(out.loss.detach()), float(out.mtp_loss.detach())], rel=2e-6)
        assert message == "expected tokens in multiples of 2 x cp = 4 in each row, got 10"
        found |= drawn
    fresh = da.init_weights(model_of(), seed=3).state_dict()
    assert found.keys() == fresh.keys() and all(torch.equal(found[name], fresh[name]) for name in fresh)
    saved, sharded = da.load(tmp_path / "saved", dtype=torch.float32).state_dict(), model_of("v3")
    da.load_sharded(sharded, tmp_path / "sharded")
    for name, tensor in whole_model.state_dict().items():
        assert torch.equal(saved[name], sharded.state_dict()[name]), name
        assert error(saved[name], tensor) < 1e-5, name
