"""The benchmark of whole models: contestants, isolated tasks and one small run. No test asserts a time."""

from __future__ import annotations

import io
import json
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import demo
from benchmarks.core import workers
from benchmarks.core.report import Report
from benchmarks.core.workers import environment, run_isolated
from benchmarks.models import contestants, whole_model
from benchmarks.models.hot_spots import hot_spots

ROOT = Path(__file__).resolve().parents[2]
TASKS = "benchmarks.models.isolated_tasks"
SMALL = {"preset": "tiny", "layers": 2, "dtype": "fp32", "threads": 1, "loads": 1}
SMALL |= {"contexts": (8,), "prompts": (16,), "sequence": 16, "budget_s": 0.0}


def test_the_native_model_shares_our_tensors_and_agrees():
    model = contestants.random_model(whole_model.Settings(**SMALL).config(), torch.float32)
    twin = contestants.native_twin(model)
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert contestants.check_same_logits(model, twin) <= contestants.PARITY


def test_different_computations_are_not_timed():
    model = contestants.random_model(whole_model.Settings(**SMALL).config(), torch.float32)
    twin = contestants.native_twin(model)
    twin.model.layers[0].input_layernorm.variance_epsilon = 1.0
    with pytest.raises(ValueError, match="refusing to time"):
        contestants.check_same_logits(model, twin)


@pytest.mark.slow
def test_a_small_run_of_the_model_benchmark(tmp_path):
    """The whole command: every part has its rows and every number its contestants."""
    options = ["--preset", "tiny", "--layers", "2", "--dtype", "fp32", "--threads", "1", "--budget", "0"]
    options += ["--contexts", "8", "--prompts", "16", "--sequence", "16", "--loads", "1"]
    command = [sys.executable, "-m", "benchmarks", "model", *options, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    report = Report.load(tmp_path / "out.json")
    contestants_of = {one.name: set(one.results) for one in report.rows}
    both = {"ours", "transformers"}
    assert contestants_of == {
        "decode at 8": both,
        "prefill 16": both,
        "training step 16": both,
        "training step 16, memory at peak": both,
        "training step 16, memory beyond the weights": both,
        "loading": both | {"plain read"},
        "loading, peak memory": both | {"plain read"},
    }
    assert "decode at 8 (ms/token)" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["command"].startswith("python -m benchmarks model --preset")


def test_unknown_parts_and_sizes_are_refused():
    with pytest.raises(ValueError, match="expected parts among decode"):
        whole_model.Settings(**SMALL, only=("decoding",))
    with pytest.raises(ValueError, match="expected dtype bf16 or fp32, got 'fp8'"):
        whole_model.Settings(**SMALL | {"dtype": "fp8"})
    with pytest.raises(ValueError, match="expected positive sizes"):
        whole_model.Settings(**SMALL | {"contexts": (0,)})


def test_hot_spots_names_the_operator_that_takes_the_time():
    a = torch.randn(300, 300)
    assert "aten::mm" in hot_spots(lambda: a @ a)


def test_a_task_can_be_stopped():
    config = whole_model.Settings(**SMALL).config().to_dict()
    task = {"task": "train", "repeats": 10**9, "threads": 1, "config": config, "dtype": "fp32", "native": False}
    steps = run_isolated(TASKS, task | {"tokens": 4}, limit_s=1.0)
    assert len(steps) < 10**9


def test_a_line_that_the_end_of_a_process_cut_is_dropped():
    lines = queue.Queue()
    workers._forward(io.StringIO('{"seconds": 1.0}\n{"seconds": 2.0}\n{"seco'), lines)
    assert [lines.get() for _ in range(3)] == ['{"seconds": 1.0}\n', '{"seconds": 2.0}\n', None]


def test_each_repetition_of_an_isolated_task_is_a_result(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(bytes(2**20))
    steps = run_isolated(TASKS, {"task": "read", "repeats": 3, "threads": 1, "folder": str(tmp_path)})
    assert len(steps) == 3
    for step in steps:
        assert step["seconds"] > 0
        assert step["peak"] >= step["before"] > 0


def test_a_failing_task_says_what_it_said():
    with pytest.raises(RuntimeError, match="no such task"):
        run_isolated(TASKS, {"task": "no such task", "threads": 1})


# ------------------------------------------------------------------ the demonstration


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "status"), [(demo.PARITY, 0), (-1.0, 1)], ids=["agrees", "disagrees"])
def test_the_demonstration_fails_where_the_models_disagree(monkeypatch, capsys, allowed, status):
    monkeypatch.setattr(demo, "CONTEXT", 64)
    monkeypatch.setattr(demo, "PARITY", allowed)
    import transformers

    verbosity = transformers.logging.get_verbosity()
    try:
        assert demo.main() == status
    finally:  # it is for the whole process
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    assert ("NO" in capsys.readouterr().out) == bool(status)
