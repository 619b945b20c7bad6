"""The example of training on many devices: one layout's run goes on on another one with the same losses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import deepseek_arch as da
from benchmarks.training import many_devices
from support.ranks import run_ranks

TEXT = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SMALL = {"layers": 2, "batch": 4, "sequence": 32, "warmup": 1, "steps": 4, "every": 2}


def trained(rank, options):
    return many_devices.train(many_devices.Settings(**SMALL | options), TEXT)


def test_a_run_goes_on_on_another_layout_with_the_same_losses(tmp_path):
    """TP 2 x EP 2 on four processes; from its checkpoint DP 4 x EP 2, and two processes of EP 2."""
    whole = run_ranks(trained, 4, {"layout": "tp=2,ep=2", "checkpoints": str(tmp_path)})
    assert all(losses == whole[0] for losses in whole) and list(whole[0]) == [1, 2, 3, 4]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["2", "4"]
    rest = {step: whole[0][step] for step in (3, 4)}
    for layout, world, out in (("ep=2", 4, ""), ("ep=2", 2, str(tmp_path / "published"))):
        options = {"layout": layout, "resume": str(tmp_path / "2"), "publish": out}
        for losses in run_ranks(trained, world, options):
            assert losses == pytest.approx(rest, rel=2e-5)
    model = da.load(tmp_path / "published", dtype=torch.float32)
    fresh = da.init_weights(da.DeepseekLM(model.config, device="meta"), 0)
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)


def test_ranks_that_share_sequences_are_given_the_same():
    """A row has a token more than `sequence`, of which each rank has a part."""
    options = {"sequence": 31, "steps": 2}
    expected = run_ranks(trained, 2, options | {"layout": "tp=2"})[0]
    for losses in run_ranks(trained, 2, options | {"layout": "cp=2"}):
        assert losses == pytest.approx(expected, rel=2e-5)


def test_it_says_how_to_be_started():
    run = subprocess.run([sys.executable, "-m", "benchmarks.training.many_devices"], capture_output=True, text=True)
    assert run.returncode == 1 and "expected to be started by torchrun" in run.stderr


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="positive sizes"):
        many_devices.Settings(every=0)
    with pytest.raises(ValueError, match="positive sizes"):
        many_devices.Settings(steps=0)
