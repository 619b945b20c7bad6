"""Workers of the benchmarks: processes that crash, hang or run out of time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.core.workers import Budget, Worker, environment, run_isolated, run_tasks
from support.clock import Clock

# ------------------------------------------------------------------ time


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


def test_tasks_share_a_process_and_their_output_goes_to_the_log(worker, tmp_path):
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
    answers = results(worker, "nothing", "nothing", "poison", "nothing")
    assert answers[2] == {"error": "ValueError: poison in two lines"}
    assert answers[3] == {"turn": 1}


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
    done = list(run_tasks(SimpleNamespace(perform=perform), tasks, Budget(25, clock), limit_s=12))
    # The third task was stopped by the end of the budget and did not fail itself.
    assert done == [(tasks[0], {"seconds": 12}), (tasks[1], {"seconds": 12})]


def test_workers_do_not_inherit_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DEEPSEEK_KERNELS_BACKEND", "reference")
    assert not {"TRITON_INTERPRET", "DEEPSEEK_KERNELS_BACKEND"} & set(environment())


def test_a_task_may_have_several_results_of_which_the_last_counts(worker):
    assert list(worker.results({"do": "three"}, 30)) == [{"turn": 1}, {"turn": 2}, {"turn": 3}]
    assert worker.perform({"do": "three"}, 30) == {"turn": 3}


def test_results_before_the_limit_are_kept_and_a_failure_shows_the_log():
    assert run_isolated("support.worker_tasks", {"do": "three, then sleep"}, limit_s=3) == [
        {"turn": n} for n in (1, 2, 3)
    ]
    with pytest.raises(RuntimeError, match=r"(?s)fail in two lines: .*a kernel's own words"):
        run_isolated("support.worker_tasks", {"do": "print and fail"})
