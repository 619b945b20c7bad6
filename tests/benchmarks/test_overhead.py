"""Limits of what a decode step and a load do besides computing, and the benchmark that measures it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import deepseek_arch as da
from benchmarks.core.report import Report
from benchmarks.models import overhead
from benchmarks.models.contestants import comparable, random_model
from deepseek_kernels import use_backend


@pytest.mark.parametrize("what", ["load", "decode step"])
def test_files_that_an_action_visits(what):
    files = overhead.files_of(what)
    assert len(files) <= overhead.MOST_FILES[what], files


def test_a_decode_step_visits_the_files_that_it_needs():
    assert {"models/main_model.py", "attention/mla.py", "moe/moe.py"} < set(overhead.files_of("decode step"))
    with pytest.raises(ValueError, match="expected load, decode step or FP8 linear, got 'save'"):
        overhead.files_of("save")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_calls_of_a_decode_step(backend):
    config = comparable(da.DeepseekConfig.from_pretrained("tiny")).replace(num_hidden_layers=7)
    with use_backend(backend):
        step = overhead.decode_step(random_model(config, torch.float32))
        step()
        counts = {overhead.count_calls(step) for _ in range(3)}
    assert len(counts) == 1 and counts.pop() <= overhead.MOST_CALLS


def test_calls_are_those_of_the_action():
    assert overhead.count_calls(lambda: None) == 0
    assert overhead.count_calls(lambda: len([max(1, 2)])) == 2


def test_the_benchmark_reports_all_parts(tmp_path):
    settings = overhead.Settings(presets=("tiny",), layers=2, batches=(1,), rounds=1)
    report = overhead.run(settings)
    report.save(tmp_path / "overhead.json")
    assert [row.name for row in Report.load(tmp_path / "overhead.json").rows] == [
        "tiny, 2 layers: calls",
        "load: files",
        "decode step: files",
        "FP8 linear: files",
        "tiny, batch 1: decode step",
    ]
    with pytest.raises(ValueError, match="expected parts among calls, files, time, got memory"):
        overhead.run(settings, ("memory",))
    with pytest.raises(ValueError, match="expected positive sizes"):
        overhead.Settings(rounds=0)
