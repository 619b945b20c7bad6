"""`python -m benchmarks gpu`: its workers, its time, its report. Nothing here checks a time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks.cli import settings_command
from benchmarks.core.report import Report, Row, Samples
from benchmarks.core.workers import Budget, Worker, environment, run_tasks
from benchmarks.gpu import run as gpu
from benchmarks.gpu import tasks as gpu_tasks
from benchmarks.operators import declare as operators
from benchmarks.operators import run as kernels

# ------------------------------------------------------------------ time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_runs_out_and_parts_leave_what_they_do_not_need():
    clock = Clock()
    whole = Budget(100, clock)
    assert (whole.left(), whole.until(0.4).left()) == (100, 40)
    clock.now += 30
    part = whole.until(0.4)
    assert (whole.spent(), whole.left(), part.left(), whole.until(0.6).left()) == (30, 70, 10, 30)
    clock.now += 15
    assert (part.left(), whole.until(0.4).left(), whole.left()) == (0, 0, 55)
    clock.now += 100
    assert whole.left() == 0


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_budget_is_not_negative(seconds):
    with pytest.raises(ValueError, match="seconds of at least 0"):
        Budget(seconds)


# ------------------------------------------------------------------ workers


@pytest.fixture
def worker(tmp_path):
    with Worker("support.worker_tasks", tmp_path / "log") as one:
        yield one


def results(worker: Worker, *tasks: str, limit_s: float = 30) -> list[dict]:
    return [worker.perform({"do": task}, limit_s) for task in tasks]


def test_tasks_share_a_process_and_their_words_go_to_the_log(worker, tmp_path):
    assert results(worker, "nothing", "print") == [{"turn": 1}, {"turn": 2}]
    assert (tmp_path / "log").read_text() == "a kernel's own words\n"


def test_a_task_that_fails_leaves_the_process_to_the_next(worker):
    assert results(worker, "fail", "nothing") == [{"error": "ValueError: fail in two lines"}, {"turn": 2}]


def test_a_process_that_dies_fails_one_task(worker):
    assert results(worker, "nothing", "die", "nothing") == [
        {"turn": 1},
        {"error": "the process died with exit status 7"},
        {"turn": 1},
    ]


def test_a_task_that_hangs_is_stopped(worker):
    assert results(worker, "nothing", "sleep", limit_s=3) == [{"turn": 1}, {"error": "stopped after 3 s"}]
    assert results(worker, "nothing") == [{"turn": 1}]


def test_a_process_whose_device_is_lost_is_replaced(worker):
    found = results(worker, "nothing", "nothing", "poison", "nothing")
    assert found[2] == {"error": "ValueError: poison in two lines"}
    assert found[3] == {"turn": 1}


def test_a_worker_that_cannot_start_is_an_error(tmp_path):
    with Worker("no_such_module", tmp_path / "log") as worker:
        assert results(worker, "nothing") == [{"error": "the process died with exit status 1"}]
    assert "no_such_module" in (tmp_path / "log").read_text()


def test_tasks_end_with_the_budget():
    clock = Clock()

    def perform(task, seconds):
        clock.now += 10
        return {"error": "stopped"} if task["number"] == 2 else {"seconds": seconds}

    tasks = [{"number": number} for number in range(4)]
    found = list(run_tasks(SimpleNamespace(perform=perform), tasks, Budget(25, clock), limit_s=12))
    # The third was stopped by the end of the budget, not by a fault of its own.
    assert found == [(tasks[0], {"seconds": 12}), (tasks[1], {"seconds": 12})]


def test_workers_do_not_inherit_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DEEPSEEK_KERNELS_BACKEND", "reference")
    assert not {"TRITON_INTERPRET", "DEEPSEEK_KERNELS_BACKEND"} & set(environment())


# ------------------------------------------------------------------ tasks


def test_a_task_is_a_check_an_operator_or_the_ceilings():
    common = {"device": "cpu", "small": True}
    assert gpu_tasks.perform({"task": "check", "name": "promotion: fp8_gemm", **common})["status"] == "passed"
    name, shape = "fp8_quantize.rows", "tiny tokens 24x192"
    found = gpu_tasks.perform({"task": "kernel", "op": name, "shape": shape, "scale": "tiny", **common})
    assert Row.from_dict(found["row"]).details["op"] == name
    assert set(gpu_tasks.perform({"task": "ceilings", **common})["ceilings"]["products"]) == {"fp32", "bf16"}
    with pytest.raises(ValueError, match="got 'dance'"):
        gpu_tasks.perform({"task": "dance", **common})


def test_an_operator_that_fails_is_a_result_and_an_error(monkeypatch):
    def fail(*inputs):
        raise RuntimeError("lost")

    monkeypatch.setattr("deepseek_kernels.quant.fp8_quantize.quantize_rows", fail)
    task = {"task": "kernel", "op": "fp8_quantize.rows", "shape": "tiny tokens 24x192", "scale": "tiny"}
    found = gpu_tasks.perform({**task, "device": "cpu", "small": True})
    assert found["error"] == found["row"]["details"]["error"] == "RuntimeError: lost"


# ------------------------------------------------------------------ the session

CEILINGS = {"copy": 1e9, "products": {"fp32": 1e12}, "absent": {}}


class FakeWorker:
    """Answers at once, or says that a task failed."""

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
    work = kernels.plan(operators.select(["moe_permute", "fp8_gemm.transposed"]), ["tiny"])
    worker = FakeWorker(clock, failing)
    return gpu.Session(folder / "gpu-test", Budget(seconds, clock), True, work, Report("kernels", {}, ()), worker)


def test_everything_right_is_status_0_and_is_saved(tmp_path):
    one = session(tmp_path)
    one.run_checks()
    one.kernels()
    assert one.status() == 0
    found = Report.load(tmp_path / "gpu-test.json")
    assert len(found.rows) == len(one.work) == 3
    assert found.facts["ceilings"] == CEILINGS
    assert {check["status"] for check in found.facts["checks"]} == {"passed"}
    assert "| moe_permute.permute | tiny 24x192, top-4 |" in (tmp_path / "gpu-test.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-test.json", "gpu-test.md"]


@pytest.mark.parametrize("failing", ["promotion: fp8_gemm", "moe_permute.permute"])
def test_one_failure_is_status_1_and_does_not_end_the_run(tmp_path, failing):
    one = session(tmp_path, failing=failing)
    one.run_checks()
    one.kernels()
    assert one.status() == 1
    assert len(one.report.rows) == 3
    assert "the process died" in (tmp_path / "gpu-test.md").read_text()


def test_what_did_not_get_its_turn_is_named_and_is_status_1(tmp_path):
    one = session(tmp_path, seconds=2.5)
    one.kernels()  # the ceilings and two of three operators
    assert len(one.report.rows) == 2
    assert (
        one.report.notes[-1] == "out of time for 1 of 3 operators and shapes: fp8_gemm.transposed tiny o_proj 192x128"
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
    found = gpu.run_pytest(str(tmp_path / "test_four.py"), tmp_path / "log", seconds, parallel=False)
    assert found[0] == status
    assert found[1].startswith(message)


# ------------------------------------------------------------------ the commands


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    return int(end.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("typer", [True, False], ids=["typer", "no typer"])
def test_without_a_gpu_it_says_so(monkeypatch, capsys, typer):
    if not typer:
        monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    assert run(monkeypatch, "gpu") == 2
    assert capsys.readouterr().err == "error: no CUDA device here; --dry-run tries the command on the CPU\n"


def test_without_typer_there_are_the_commands_that_do_not_need_it(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    assert run(monkeypatch, "model") == 2
    assert "error: expected one of kernels, gpu" in capsys.readouterr().err
    assert run(monkeypatch, "kernels", "--list") == 0


def test_the_gpu_command_imports_neither_typer_nor_rich_nor_transformers(tmp_path):
    code = (
        "import sys; from benchmarks.gpu import run, tasks; print({'typer', 'rich', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("arguments", [("--only", "benchmarks"), ("--op", "nothing"), ("--minutes", "-1")])
def test_arguments_that_mean_nothing_are_one_line(monkeypatch, capsys, tmp_path, arguments):
    assert run(monkeypatch, "gpu", "--dry-run", "--out", str(tmp_path), *arguments) == 2
    assert capsys.readouterr().err.startswith("error: expected")


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    rounds: int = 3
    sizes: tuple[int, ...] = (1, 2)
    shapes: tuple[tuple[int, int], ...] = ((3, 4), (5, 6))
    folder: str | None = None
    verbose: bool = False


def row_of(settings: Settings, parts: tuple[str, ...] = ()) -> Row:
    return Row(f"{settings} {parts}", "ms", "lower", {"ours": Samples((1.0,))})


def test_a_benchmark_with_settings_has_an_option_for_each(tmp_path, capsys):
    def run(settings, parts=("a", "b"), *, on_row):
        one = row_of(settings, parts)
        on_row(one)
        return Report("some", {}, (one,))

    module = SimpleNamespace(Settings=Settings, run=run, PARTS=("a", "b"), __doc__="Measures 100% of it.")
    path = tmp_path / "out.json"
    arguments = ["--rounds", "5", "--sizes", "7,8", "--shapes", "1x2", "--verbose", "--only", "b", "--out", str(path)]
    assert settings_command.main("some", module, arguments) == 0
    (found,) = Report.load(path).rows
    assert found == row_of(Settings(5, (7, 8), ((1, 2),), None, True), ("b",))
    assert found.name in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settings_command.main("some", module, ["--help"])
    text = capsys.readouterr().out
    assert "Measures 100% of it." in text
    assert "[3x4,5x6]" in text


def test_a_benchmark_that_only_runs_gets_threads_as_well(tmp_path):
    module = SimpleNamespace(
        Settings=Settings, run=lambda settings: Report("some", {}, (row_of(settings),)), __doc__=""
    )
    path, before = tmp_path / "out.json", torch.get_num_threads()
    try:
        assert settings_command.main("some", module, ["--threads", "1", "--out", str(path)]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert Report.load(path).rows == (row_of(Settings()),)


@pytest.mark.slow
def test_the_dry_run_goes_through_everything(tmp_path):
    """The whole command on the CPU: tests, checks, ceilings and operators."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path), "--op", "fp8_quantize"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert data["command"].startswith("python -m benchmarks gpu --dry-run")
    found = Report.load(tmp_path / "gpu-dry-run.json")
    assert {check["status"] for check in found.facts["checks"]} == {"passed"}
    assert found.facts["checks"][0]["name"] == "pytest tests/ops/test_dispatch.py"
    assert {one.details["op"] for one in found.rows} == {o.name for o in operators.select(["fp8_quantize"])}
    assert all("error" not in one.details for one in found.rows)
