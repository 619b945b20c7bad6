"""Tasks one after the other in a process of their own, which may crash, hang or run out of time.

A kernel that reads beyond its memory leaves a GPU context in which nothing works any more. So the tasks run in a
worker: if it dies, or a task takes too long, that task has failed, and the next one gets a new worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["ROOT", "Budget", "Worker", "environment", "run_tasks", "work"]

ROOT = Path(__file__).resolve().parents[2]
STARTUP_S = 120.0  # imports, on a slow disk


class Budget:
    """Seconds until a deadline.

    Raises:
        ValueError: negative seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not seconds >= 0:
            raise ValueError(f"expected seconds of at least 0, got {seconds}")
        self._seconds, self._clock, self._start = seconds, clock, clock()

    def spent(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        """At least 0."""
        return max(0.0, self._seconds - self.spent())

    def until(self, share: float) -> Budget:
        """What is left until `share` of the whole is spent."""
        return Budget(max(0.0, self._seconds * share - self.spent()), self._clock)


def environment() -> dict[str, str]:
    """That of a process that runs kernels on the device as users do: not interpreted, on the backend `auto`."""
    unwanted = ("TRITON_INTERPRET", "DEEPSEEK_KERNELS_BACKEND")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])}


# ------------------------------------------------------------------ the process that waits


class Worker:
    """A process that performs tasks, replaced by a new one when it has to be. A context manager: it ends with it.

    Args:
        module: run with `python -m`; it calls `work`.
        log: what it prints is appended here.
    """

    def __init__(self, module: str, log: Path) -> None:
        self._module, self._log = module, log
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def perform(self, task: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The result of a task, as JSON has it; {"error": why} if it took too long or the process died."""
        try:
            if self._process is None:
                self._start()
                self._answer(STARTUP_S)
            self._process.stdin.write(json.dumps(dict(task)) + "\n")
            self._process.stdin.flush()
            answer = self._answer(seconds)
        except (_Gone, BrokenPipeError) as why:
            status = self.stop()
            return {"error": str(why) if isinstance(why, _Late) else f"the process died with exit status {status}"}
        if not answer["healthy"]:
            self.stop()
        return answer["result"]

    def _start(self) -> None:
        self._answers = queue.Queue()
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
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise _Late(f"stopped after {seconds:.0f} s") from None
        if line is None:
            raise _Gone
        return json.loads(line)

    def stop(self) -> int | None:
        """Ends the process; its exit status."""
        if self._process is None:
            return None
        # One that died by itself says why; it may take a moment from its last line to its end.
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


class _Gone(Exception):
    """The process ended."""


class _Late(_Gone):
    """The process has not answered."""


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def run_tasks(
    worker: Worker, tasks: Sequence[Mapping[str, Any]], budget: Budget, limit_s: float
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Each task with its result, in order, until the budget is spent: the rest, and the one it ended in, are left out.

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


# ------------------------------------------------------------------ the process that works


def work(perform: Callable[[dict[str, Any]], dict[str, Any]], healthy: Callable[[], bool]) -> None:
    """Performs the tasks on standard input, a line of JSON each, and answers likewise on standard output.

    Whatever else is printed goes to standard error.

    Args:
        perform: a task's result.
        healthy: whether this process can go on; asked after each failure.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    print("{}", file=answers, flush=True)  # ready
    for line in sys.stdin:
        try:
            result = perform(json.loads(line))
        except Exception as error:  # the worker's whole purpose: the next task gets its turn
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        fine = "error" not in result or healthy()
        print(json.dumps({"result": result, "healthy": fine}), file=answers, flush=True)
