"""Every GPU check and benchmark in one command with a time limit.

First the operators' tests, then the checks that only a GPU can make, then the machine's ceilings, then the operators,
the most important shapes first. The report is written after every result, so that it survives any end of the run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from ..core.machine import device_slug
from ..core.report import RESULTS, Report, Row
from ..core.tables import progress_line
from ..core.workers import Budget, Worker, run_tasks
from ..operators.declare import Operator, Shape, select
from ..operators.measuring import plan
from ..operators.rooflines import Ceilings
from ..operators.scales import SCALES
from ..operators.tables import kernel_table
from .checks import checks
from .pytest_process import run_pytest
from .sizes import FULL, SMALL

__all__ = ["PARTS", "Session", "Settings", "main"]

PARTS = ("tests", "checks", "kernels")
# Share of the whole time that each part may have spent, with those before it. The rest is left to the next part.
SHARES = {"tests": 0.4, "checks": 0.6, "kernels": 1.0}
LIMIT_S = 60.0  # of one task
_KEEP = 0.97  # the rest is for starting, stopping and writing


@dataclass
class Session:
    """One run: its work and its results.

    Attributes:
        stem: of its files.
        checks: name, status ("passed", "failed", "skipped" or "not run"), seconds and message of each.
    """

    stem: Path
    budget: Budget
    small: bool
    work: Sequence[tuple[Operator, Shape]]
    report: Report
    worker: Worker
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    def path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    def save(self) -> None:
        """Writes JSON and Markdown, each to another file that is then renamed, so that neither is ever half written."""
        self.report = replace(self.report, facts=dict(self.report.facts) | {"checks": list(self.checks)})
        with tempfile.TemporaryDirectory(dir=self.stem.parent) as folder:
            drafts = Path(folder) / "report.json", Path(folder) / "report.md"
            self.report.save(drafts[0])
            drafts[1].write_text(kernel_table(self.report).to_markdown(), encoding="utf-8")
            for draft in drafts:
                draft.replace(self.path(draft.suffix))

    # ---------------------------------------------------------------- parts

    def tests(self) -> None:
        """Runs pytest on the operators' tests, on the device."""
        tests = "tests/ops/test_dispatch.py" if self.small else "tests/ops"
        start, budget = time.monotonic(), self.budget.until(SHARES["tests"])
        status, message = run_pytest(tests, self.path("-tests.log"), budget.left(), parallel=not self.small)
        self.add_check(f"pytest {tests}", status, message, time.monotonic() - start)

    def run_checks(self) -> None:
        """Runs the checks that only a GPU can make."""
        names = list(checks(SMALL if self.small else FULL))
        start = time.monotonic()
        for task, result in self._run([{"task": "check", "name": name} for name in names], "checks"):
            status = "failed" if "error" in result else result["status"]
            now = time.monotonic()
            self.add_check(task["name"], status, result.get("error") or result["message"], now - start)
            start = now
        self._not_run(names)

    def kernels(self) -> None:
        """Measures the ceilings, then the operators."""
        tasks: list[dict[str, Any]] = [{"task": "ceilings"}]
        tasks += [
            {"task": "kernel", "op": operator.name, "shape": shape.name, "scale": shape.scale}
            for operator, shape in self.work
        ]
        for task, result in self._run(tasks, "kernels"):
            if task["task"] == "ceilings":
                self._add_ceilings(result)
            else:
                self.add_row(self._row(task, result))
        done = {row.name for row in self.report.rows}
        left = [f"{operator.name} {shape.name}" for operator, shape in self.work]
        left = [name for name in left if name not in done]
        if left:
            self._note(f"out of time for {len(left)} of {len(self.work)} operators and shapes: {'; '.join(left)}")

    def _run(self, tasks: Sequence[Mapping[str, Any]], part: str) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
        todo = [{**task, "device": self.device, "small": self.small} for task in tasks]
        return run_tasks(self.worker, todo, self.budget.until(SHARES[part]), LIMIT_S)

    # ---------------------------------------------------------------- results

    def add_check(self, name: str, status: str, message: str, seconds: float) -> None:
        self.checks.append({"name": name, "status": status, "seconds": round(seconds, 2), "message": message})
        print(f"{status:8} {name}{': ' if message else ''}{message}", flush=True)
        self.save()

    def _not_run(self, names: Sequence[str]) -> None:
        done = {check["name"] for check in self.checks}
        for name in names:
            if name not in done:
                self.add_check(name, "not run", "out of time", 0.0)

    def add_row(self, row: Row) -> None:
        self.report = replace(self.report, rows=(*self.report.rows, row))
        print(f"{'failed' if 'error' in row.details else 'timed':8} {progress_line(row)}", flush=True)
        self.save()

    def _add_ceilings(self, result: Mapping[str, Any]) -> None:
        if "error" in result:
            self.add_check("ceilings", "failed", result["error"], 0.0)
            return
        self.report = replace(self.report, facts=dict(self.report.facts) | {"ceilings": result["ceilings"]})
        self._note(str(Ceilings.from_dict(result["ceilings"])))

    def _note(self, text: str) -> None:
        self.report = replace(self.report, notes=(*self.report.notes, text))
        print(text, flush=True)
        self.save()

    def _row(self, task: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
        if "row" in result:
            return Row.from_dict(result["row"])
        details = {"op": task["op"], "shape": task["shape"], "error": result["error"]}
        return Row(f"{task['op']} {task['shape']}", "ms", "lower", {}, details=details)

    def status(self) -> int:
        """Returns the exit status: 0 if everything ran and was right."""
        right = all(check["status"] in ("passed", "skipped") for check in self.checks)
        rows = all("error" not in row.details for row in self.report.rows)
        complete = not any(note.startswith("out of time") for note in self.report.notes)
        return 0 if right and rows and complete else 1


# ------------------------------------------------------------------ the command


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Time, parts and operators of the run.

    Raises:
        ValueError: an unknown part.
    """

    out: Annotated[Path, "folder of the results"] = RESULTS
    minutes: Annotated[float, "for everything"] = 10.0
    only: Annotated[tuple[str, ...], "parts"] = PARTS
    op: Annotated[tuple[str, ...], "operators to time (default: all)"] = ()
    shape: Annotated[tuple[str, ...], f"among {', '.join(SCALES)}"] = ("v3", "v2-lite", "kimi-k2")
    dry_run: Annotated[bool, "try the command itself: tiny shapes, on the CPU"] = False

    def __post_init__(self) -> None:
        if not set(self.only) <= set(PARTS):
            raise ValueError(f"expected parts among {', '.join(PARTS)}, got {','.join(self.only)!r}")


def main(settings: Settings) -> int:
    """Runs the command `gpu`: 0 if everything ran and was right, 1 if not, 2 without a GPU.

    Raises:
        ValueError: an unknown operator or shape.
    """
    s = settings
    if not s.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device here; --dry-run tries the command on the CPU", file=sys.stderr)
        return 2
    scales = ("tiny",) if s.dry_run else s.shape
    facts = {"minutes": s.minutes, "parts": s.only, "shapes": scales, "dry_run": s.dry_run}
    report = Report("kernels", facts, ())
    budget = Budget(60 * s.minutes * _KEEP)
    out, work = s.out.resolve(), plan(select(s.op), scales)
    stem = "gpu-dry-run" if s.dry_run else f"gpu-{device_slug(report.machine)}"
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{stem}-worker.log"
    log.write_text("", encoding="utf-8")
    with Worker("benchmarks.gpu.tasks", log) as worker:
        session = Session(out / stem, budget, s.dry_run, work, report, worker)
        session.save()
        steps = {"tests": session.tests, "checks": session.run_checks, "kernels": session.kernels}
        for part in PARTS:
            if part in s.only:
                steps[part]()
    print(kernel_table(session.report).to_text())
    print(f"saved {session.path('.json')} and {session.path('.md').name} after {budget.spent():.0f} s")
    return session.status()
