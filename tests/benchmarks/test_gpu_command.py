"""`python -m benchmarks gpu`: its tasks, its session, its report. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cli.commands import main
from benchmarks.core.report import Report, Row, Samples
from benchmarks.core.workers import Budget, environment
from benchmarks.gpu import run as gpu
from benchmarks.gpu import tasks as gpu_tasks
from benchmarks.gpu.pytest_process import run_pytest
from benchmarks.operators import declare as operators
from benchmarks.operators.measuring import plan
from support.clock import Clock

# ------------------------------------------------------------------ tasks


def test_a_task_is_a_check_an_operator_or_the_ceilings():
    common = {"device": "cpu", "small": True}
    assert gpu_tasks.perform({"task": "check", "name": "promotion: fp8_gemm", **common})["status"] == "passed"
    name, shape = "fp8_quantize.rows", "tiny tokens 24x192"
    result = gpu_tasks.perform({"task": "kernel", "op": name, "shape": shape, "scale": "tiny", **common})
    assert Row.from_dict(result["row"]).details["op"] == name
    assert set(gpu_tasks.perform({"task": "ceilings", **common})["ceilings"]["products"]) == {"fp32", "bf16"}
    with pytest.raises(ValueError, match="got 'dance'"):
        gpu_tasks.perform({"task": "dance", **common})


def test_an_operator_that_fails_is_a_result_and_an_error(monkeypatch):
    def fail(*inputs):
        raise RuntimeError("lost")

    monkeypatch.setattr("deepseek_kernels.quant.fp8_quantize.quantize_rows", fail)
    task = {"task": "kernel", "op": "fp8_quantize.rows", "shape": "tiny tokens 24x192", "scale": "tiny"}
    result = gpu_tasks.perform({**task, "device": "cpu", "small": True})
    assert result["error"] == result["row"]["details"]["error"] == "RuntimeError: lost"


# ------------------------------------------------------------------ the session

CEILINGS = {"copy": 1e9, "products": {"fp32": 1e12}, "absent": {}}


class FakeWorker:
    """Answers at once, or reports that a task failed."""

    def __init__(self, clock: Clock, failing: str = "") -> None:
        self.clock, self.failing = clock, failing

    def perform(self, task, seconds):
        self.clock.now += 1
        if task["task"] == "ceilings":
            return {"ceilings": CEILINGS}
        name = task["name"] if task["task"] == "check" else task["op"]
        if name == self.failing:
            return {"error": "the process died"}
        if task["task"] == "check":
            return {"status": "passed", "message": ""}
        details = {"op": name, "shape": task["shape"], "flops": 0, "bytes": 1, "product": "fp8", "runs": "triton"}
        row = Row(f"{name} {task['shape']}", "ms", "lower", {"ours": Samples((1.0,))}, details=details)
        return {"row": row.to_dict()}


def session(folder: Path, seconds: float = 1e6, failing: str = "") -> gpu.Session:
    clock = Clock()
    work = plan(operators.select(["moe_permute", "fp8_gemm.transposed"]), ["tiny"])
    worker = FakeWorker(clock, failing)
    return gpu.Session(folder / "gpu-test", Budget(seconds, clock), True, work, Report("kernels", {}, ()), worker)


def test_everything_right_is_status_0_and_is_saved(tmp_path):
    one = session(tmp_path)
    one.run_checks()
    one.kernels()
    assert one.status() == 0
    saved = Report.load(tmp_path / "gpu-test.json")
    assert len(saved.rows) == len(one.work) == 4
    assert saved.facts["ceilings"] == CEILINGS
    assert {check["status"] for check in saved.facts["checks"]} == {"passed"}
    assert "| moe_permute.permute | tiny 24x192, top-4 |" in (tmp_path / "gpu-test.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-test.json", "gpu-test.md"]


@pytest.mark.parametrize("failing", ["promotion: fp8_gemm", "moe_permute.permute"])
def test_one_failure_is_status_1_and_does_not_end_the_run(tmp_path, failing):
    one = session(tmp_path, failing=failing)
    one.run_checks()
    one.kernels()
    assert one.status() == 1
    assert len(one.report.rows) == 4
    assert "the process died" in (tmp_path / "gpu-test.md").read_text()


def test_work_that_was_not_reached_is_named_and_is_status_1(tmp_path):
    one = session(tmp_path, seconds=3.5)
    one.kernels()  # the time is enough for the ceilings and three of four operators
    assert len(one.report.rows) == 3
    assert (
        one.report.notes[-1] == "out of time for 1 of 4 operators and shapes: fp8_gemm.transposed tiny o_proj 192x128"
    )
    assert one.status() == 1
    late = session(tmp_path, seconds=0)
    late.run_checks()
    late.tests()
    assert {check["status"] for check in late.checks} == {"not run"}
    assert late.status() == 1


def test_a_report_is_there_after_every_result(tmp_path):
    one = session(tmp_path)
    one.add_check("first", "passed", "", 0.0)
    assert Report.load(tmp_path / "gpu-test.json").facts["checks"][0]["name"] == "first"
    one.add_check("second", "skipped", "too little memory", 0.0)
    assert len(Report.load(tmp_path / "gpu-test.json").facts["checks"]) == 2
    assert one.status() == 0


# ------------------------------------------------------------------ pytest in a process of its own


TESTS = """
import pytest, time
def test_right(): pass
def test_wrong(): assert False
@pytest.mark.skip
def test_other(): pass
def test_slow(): time.sleep(100)
"""


@pytest.mark.parametrize(
    ("chosen", "seconds", "status", "message"),
    [
        ("right or other", 60, "passed", "1 passed, 1 skipped"),
        ("right or wrong", 60, "failed", "1 passed, 1 failed: test_wrong; see log"),
        ("nothing", 60, "failed", "no tests; see log"),
        ("right or slow", 6, "failed", "stopped after 6 s; "),
        ("right", 0, "not run", "out of time"),
    ],
)
def test_pytest_is_run_and_summarized(tmp_path, monkeypatch, chosen, seconds, status, message):
    (tmp_path / "test_four.py").write_text(TESTS)
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-k '{chosen}' -c {tmp_path / 'none.ini'}")
    (tmp_path / "none.ini").write_text("[pytest]\n")
    outcome = run_pytest(str(tmp_path / "test_four.py"), tmp_path / "log", seconds, parallel=False)
    assert outcome[0] == status
    assert outcome[1].startswith(message)


# ------------------------------------------------------------------ the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["gpu"]) == 2
    assert capsys.readouterr().err == "error: no CUDA device here; --dry-run tries the command on the CPU\n"


@pytest.mark.parametrize("arguments", [("--only", "benchmarks"), ("--op", "nothing"), ("--minutes", "-1")])
def test_arguments_that_mean_nothing_are_one_line(capsys, tmp_path, arguments):
    assert main(["gpu", "--dry-run", "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: expected")


@pytest.mark.slow
def test_the_dry_run_goes_through_everything(tmp_path):
    """The whole command on the CPU: tests, checks, ceilings and operators."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path), "--op", "fp8_quantize"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert data["command"].startswith("python -m benchmarks gpu --dry-run")
    saved = Report.load(tmp_path / "gpu-dry-run.json")
    assert {check["status"] for check in saved.facts["checks"]} == {"passed"}
    assert saved.facts["checks"][0]["name"] == "pytest tests/ops/test_dispatch.py"
    assert {one.details["op"] for one in saved.rows} == {o.name for o in operators.select(["fp8_quantize"])}
    assert all("error" not in one.details for one in saved.rows)
