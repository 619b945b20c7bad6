"""`deepseek-arch plan --gpus`: what it prints, as tables and as JSON, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_arch.cli import main

ROOT = Path(__file__).resolve().parents[2]
AS_TRAINED = ("--layout", "pp=16,ep=64", "--schedule", "dualpipe", "--zero", "1", "--recompute", "selective")


@pytest.fixture
def plan(capsys, monkeypatch):
    """Runs `deepseek-arch plan` -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *map(str, args)])
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


def test_deepseek_v3_as_it_was_trained(plan):
    code, out, _ = plan("deepseek-v3", "--gpus", 2048, "--device", "h800", *AS_TRAINED)
    assert code == 0
    for text in ("training on 2,048 H800", "pp=16,dp_shard=128,ep=64", "120 micro-batches", "expert dispatch", "GB"):
        assert text in out
    assert "serving: expected pp = cp = 1 for serving" in out


def test_json_holds_everything(plan):
    code, out, _ = plan("deepseek-v3", "--gpus", 2048, *AS_TRAINED, "--json")
    answer = json.loads(out)
    assert code == 0 and answer["model"] == "deepseek-v3"
    (training,) = answer["training"]["plans"]
    assert training["step_seconds"] == pytest.approx(19.9, rel=0.15)
    assert training["memory_total_bytes"] == sum(training["memory_bytes"].values())
    assert training["step_seconds"] == pytest.approx(sum(training["seconds"].values()))
    assert training["layout"]["edp"] == 2 and training["fits"]
    assert answer["device"]["sources"]["nvlink, network"].startswith("arXiv")
    assert answer["serving"]["plans"] == [] and "pp 16" in answer["serving"]["reason"]


def test_a_search_lists_layouts(plan):
    code, out, _ = plan("mini", "--gpus", 8, "--device", "H200", "--step-batch", 64, "--search", "--batch", 4)
    assert code == 0
    assert "H200 are its data sheet's peaks" in out
    assert "for training" in out and "best for serving" in out and "dp_shard=8" in out
    code, out, _ = plan("mini", "--gpus", 8, "--step-batch", 64, "--search", "--layout", "tp=2", "--json")
    found = json.loads(out)
    assert len(found["training"]["plans"]) == 10
    assert {p["layout"]["tp"] for p in found["training"]["plans"] + found["serving"]["plans"]} == {2}


def test_what_does_not_fit_says_so_and_serving_is_still_planned(plan):
    code, out, _ = plan("deepseek-v3", "--gpus", 8, "--device", "h200", "--batch", 64, "--layout", "ep=8")
    assert code == 0
    assert "No training plan of" in out and "does not fit" in out
    assert "serving on 8 H200" in out and "126.4 of 141 GB" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--layout", "pp=7"), "expected pp x dp_replicate x cp x tp = 7 to divide 2048 devices"),
        (("--layout", "ep=3"), "expected ep x etp to divide dp_shard x cp x tp = 2048, got 3 x 1 = 3"),
        (("--layout", "gp=3"), "expected axes such as pp=16,ep=64"),
        (("--device", "abacus"), "expected a device of h800"),
        (("--layout", "tp=3,dp_shard=1"), "= 2048 devices, got 3"),
    ],
)
def test_mistakes_are_one_line(plan, args, message):
    code, out, err = plan("deepseek-v3", "--gpus", 2048, *args)
    assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("args", [("--layout", "pp=2"), ("--search",), ("--gpus", "0"), ("--gpus", "8", "--zero", "4")])
def test_wrong_usage_exits_with_two(plan, args):
    assert plan("mini", *args)[0] == 2


def test_planning_starts_without_torch():
    code = (
        "import sys; from deepseek_arch.cli import main\n"
        "try: main(['plan', 'mini', '--gpus', '8', '--step-batch', '64', '--json'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "import deepseek_arch as da; da.ParallelLayout(tp=2), da.plan_training\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
