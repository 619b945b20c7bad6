"""Tasks in another process, which may crash, hang, run out of time, or have its memory measured.

A kernel that reads beyond its memory leaves a GPU context in which nothing works any more, and the peak memory of a
process is that of everything it has ever done. A `Worker` performs tasks one after the other and is replaced when it
dies or a task takes too long; `run_isolated` gives one task a fresh process.

The two processes exchange JSON, a line each: a task on standard input; on standard output {"result": ...} for each
result of it, then {"healthy": true or false}.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = [
    "ROOT",
    "Budget",
    "ProcessDied",
    "TaskStopped",
    "Worker",
    "environment",
    "run_isolated",
    "run_tasks",
    "work",
]

ROOT = Path(__file__).resolve().parents[2]
STARTUP_S = 120.0  # for the imports of a process, on a slow disk


class Budget:
    """Seconds until a deadline.

    Raises:
        ValueError: negative seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not seconds >= 0:
            raise ValueError(f"expected seconds of at least 0, got {seconds}")
        self.seconds, self._clock, self._start = seconds, clock, clock()

    def spent(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        """Returns the seconds until the deadline, at least 0."""
        return max(0.0, self.seconds - self.spent())

    def until(self, share: float) -> Budget:
        """Returns a budget that ends when `share` of this one's seconds is spent."""
        return Budget(max(0.0, self.seconds * share - self.spent()), self._clock)


def environment() -> dict[str, str]:
    """Returns the variables of a process that runs kernels as users do: compiled, on the backend `auto`."""
    unwanted = ("TRITON_INTERPRET", "DEEPSEEK_KERNELS_BACKEND")
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    return inherited | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])}


# ------------------------------------------------------------------ the process that waits


class TaskStopped(Exception):
    """A task that did not end in time."""


class ProcessDied(Exception):
    """A process that ended during a task."""


class Worker:
    """A process that performs tasks, replaced by a new one when it has to be. A context manager that ends it.

    Args:
        module: run with `python -m`; it calls `work`.
        log: its output is appended here.
    """

    def __init__(self, module: str, log: Path) -> None:
        self._module, self._log = module, log
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def perform(self, task: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Returns the last result of a task; {"error": reason} if it failed, took too long or the process died."""
        try:
            *_, last = self.results(task, seconds)
        except (TaskStopped, ProcessDied) as reason:
            return {"error": str(reason)}
        return last

    def results(self, task: Mapping[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        """Yields each result of a task when it comes; the last one is {"error": reason} if the task failed.

        Raises:
            TaskStopped: the task took longer than `seconds`; its process is gone.
            ProcessDied: the process ended during the task.
        """
        try:
            if self._process is None:
                self._start()
                self._read(Budget(STARTUP_S))
            self._process.stdin.write(json.dumps(dict(task)) + "\n")
            self._process.stdin.flush()
            budget = Budget(seconds)
            while "result" in (answer := self._read(budget)):
                yield answer["result"]
        except TaskStopped:
            self.stop()
            raise
        except (EOFError, BrokenPipeError):
            raise ProcessDied(f"the process died with exit status {self.stop()}") from None
        if not answer["healthy"]:
            self.stop()

    def _start(self) -> None:
        self._lines = queue.Queue()
        with self._log.open("a", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()

    def _read(self, budget: Budget) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=budget.left())
        except queue.Empty:
            raise TaskStopped(f"stopped after {budget.seconds:.0f} s") from None
        if line is None:
            raise EOFError
        return json.loads(line)

    def stop(self) -> int | None:
        """Ends the process and returns its exit status."""
        if self._process is None:
            return None
        # A process that died by itself has its own status, perhaps a moment after its last line.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)
        self._process.kill()
        status = self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process = None
        return status

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _forward(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    """Puts every whole line of the stream into the queue, None after the last one."""
    for line in stream:
        if line.endswith("\n"):  # the end of the process may have cut a line
            lines.put(line)
    lines.put(None)


def run_tasks(
    worker: Worker, tasks: Sequence[Mapping[str, Any]], budget: Budget, limit_s: float
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yields each task with its result, in order, until the budget is spent.

    The task that the end of the budget interrupts is left out, as are those after it.

    Args:
        limit_s: seconds that one task may take.
    """
    for task in tasks:
        if budget.left() <= 0:
            return
        result = worker.perform(task, min(limit_s, budget.left()))
        if "error" in result and budget.left() <= 0:
            return
        yield task, result


def run_isolated(module: str, task: Mapping[str, Any], limit_s: float = threading.TIMEOUT_MAX) -> list[dict[str, Any]]:
    """Performs one task in a fresh process and returns its results, as many as came within `limit_s` seconds.

    Raises:
        RuntimeError: the task failed; the message ends with the last output of the process.
    """
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with Worker(module, log) as worker:
            try:
                for result in worker.results(task, limit_s):
                    if "error" in result:
                        raise ProcessDied(result["error"])
                    results.append(result)
            except TaskStopped:
                pass
            except ProcessDied as reason:
                output = log.read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"{dict(task)} failed, {reason}: {output}") from None
    return results


# ------------------------------------------------------------------ the process that works


def work(
    perform: Callable[[dict[str, Any]], dict[str, Any] | Iterator[dict[str, Any]]],
    healthy: Callable[[], bool] = lambda: True,
) -> None:
    """Performs the tasks on standard input and answers on standard output; other output goes to standard error.

    Args:
        perform: returns the result of a task, or yields several.
        healthy: returns False if this process cannot go on; called after each failure.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # for C code, which prints past sys.stdout
        sys.stdout = sys.stderr

        def answer(**line: Any) -> None:
            print(json.dumps(line), file=answers, flush=True)

        answer(ready=True)
        for line in sys.stdin:
            failed = False
            try:
                results = perform(json.loads(line))
                for result in [results] if isinstance(results, dict) else results:
                    failed = "error" in result
                    answer(result=result)
            except Exception as error:  # a task may raise anything, and the next task is to get its turn
                failed = True
                text = " ".join(str(error).split())[:300]
                answer(result={"error": f"{type(error).__name__}: {text}"})
            answer(healthy=not failed or healthy())
