"""Errors in the arguments of one rank: raised on all of them, before any waits for another."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from deepseek_arch.parallel.call_agreement import fingerprint
from support import small_models
from support.cut_models import SIZES
from support.ranks import run_ranks

CONFIG = small_models.config("v3", **SIZES)
IDS = small_models.tokens(CONFIG, 4, 8)


def changed(tensor, value):
    tensor = tensor.clone()
    tensor[0, 0] = value
    return tensor


# By name: the arguments of rank 1, where those of rank 0 are right, and the message on both.
WRONG = {
    "an id": ({"input_ids": changed(IDS, 64)}, "expected token ids between 0 and 63, got 64"),
    "a label": ({"labels": changed(IDS, -3)}, "expected labels of -100 or between 0 and 63, got -3"),
    "a mask": ({"attention_mask": torch.ones(4, 5)}, "expected attention_mask [4, 8], got [4, 5]"),
    "positions": ({"position_ids": torch.ones(4, 8)}, "expected integer position_ids, got torch.float32"),
    "no tensor": ({"input_ids": [1, 2]}, "expected input_ids to be a "),
}
DIFFERENT = {
    "other ids": {"input_ids": IDS.flip(0), "labels": IDS.flip(0)},
    "other labels": {"labels": changed(IDS, -100)},
    "another mask": {"attention_mask": changed(torch.ones_like(IDS), 0)},
}


def calls(rank, run, shares):
    """Messages of calls that are wrong on rank 1, between two that are right everywhere."""
    right = {"input_ids": IDS, "labels": IDS}
    messages = [run(right)]
    cases = [*WRONG.values(), *((case, "expected the same arguments on the 2 ranks") for case in DIFFERENT.values())]
    for case, expected in cases if shares else WRONG.values():
        with pytest.raises(ValueError) as caught:
            run(right | case if rank else right)
        assert expected in str(caught.value), (rank, case)
        messages.append(str(caught.value))
    assert run(right) == pytest.approx(messages[0], rel=1e-6)
    return messages[1:]


def in_passes(rank, axes):
    model = da.parallelize(small_models.model(CONFIG).train(), ParallelLayout(**axes))

    def run(given):
        model.zero_grad()
        out = model(**given, return_logits=False)
        (out.loss + 0.3 * out.mtp_loss).backward()
        return float(out.loss.detach())

    messages = calls(rank, run, shares="dp_shard" not in axes)
    with torch.no_grad():
        messages += calls(rank, lambda given: float(model(**given, return_logits=False).loss), "dp_shard" not in axes)
        if "dp_shard" in axes:
            with pytest.raises(ValueError) as caught:
                model(IDS, labels=IDS if rank else None)
            assert "expected labels on all 2 ranks or on none" in str(caught.value)
    return messages


@pytest.mark.parametrize("axes", [{"tp": 2}, {"cp": 2, "ep": 2}, {"dp_shard": 2, "ep": 2}], ids=str)
def test_a_wrong_argument_of_one_rank_is_raised_on_all(axes):
    first, second = run_ranks(in_passes, 2, axes)
    assert first == second


def in_replicas(rank):
    """Replicas make as many passes as each likes, without gradients."""
    model = da.parallelize(small_models.model(CONFIG), ParallelLayout(dp_replicate=2))
    with torch.no_grad():
        return [float(model(IDS, labels=IDS, return_logits=False).loss) for _ in range(1 + rank)]


def test_replicas_are_independent_without_gradients():
    first, second = run_ranks(in_replicas, 2)
    assert first + first == second


def in_steps(rank):
    model = small_models.model(CONFIG.replace(num_hidden_layers=2)).train()
    pipe = da.pipeline(model, ParallelLayout(pp=2), microbatches=2)
    return calls(rank, lambda given: float(pipe.step(**given).loss), shares=True)


def test_a_wrong_argument_of_a_step_is_raised_on_all():
    first, second = run_ranks(in_steps, 2)
    assert first == second


def test_fingerprints_tell_arguments_apart():
    several = [
        fingerprint((IDS, IDS)),
        fingerprint((IDS, IDS.flip(0))),
        fingerprint((IDS.flip(1), IDS)),
        fingerprint((IDS, None)),
        fingerprint((None, IDS)),
        fingerprint((IDS.view(8, 4), IDS.view(8, 4))),
        fingerprint((IDS, IDS), (True,)),
        fingerprint((IDS, IDS), (0.3,)),
    ]
    assert len({int(mark) for mark in several}) == len(several)
    assert int(fingerprint((IDS.int(), IDS))) == int(several[0])
