"""Every GPU check and benchmark in one command with a time limit: `python -m benchmarks gpu --help`.

First the operators' tests, then what only a GPU can show, then the machine's ceilings, then the operators, the most
important shapes first. The report is written again after every result, so that whatever ends the run leaves what it
found.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.machine import describe_machine
from ..core.report import Report, Row
from ..core.tables import to_markdown
from ..core.workers import ROOT, Budget, Worker, environment, run_tasks
from ..operators.declare import Operator, Shape, select
from ..operators.rooflines import Ceilings
from ..operators.run import RESULTS, plan, slug
from ..operators.scales import SCALES
from ..operators.tables import to_text
from . import checks as gpu_checks

__all__ = ["PARTS", "Session", "main"]

PARTS = ("tests", "checks", "kernels")
# What each part may have spent, with those before it, of the whole time. A part that needs less leaves it to the next.
SHARES = {"tests": 0.4, "checks": 0.6, "kernels": 1.0}
LIMIT_S = 60.0  # that one task may take
_KEEP = 0.97  # the rest is for starting, stopping and writing


@dataclass
class Session:
    """One run: what it is to do and what it has found.

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
        """Writes JSON and Markdown, each by way of a file beside it: a reader never sees half of one."""
        self.report = replace(self.report, facts=dict(self.report.facts) | {"checks": list(self.checks)})
        with tempfile.TemporaryDirectory(dir=self.stem.parent) as folder:
            drafts = Path(folder) / "report.json", Path(folder) / "report.md"
            self.report.save(drafts[0])
            drafts[1].write_text(to_markdown(self.report), encoding="utf-8")
            for draft in drafts:
                draft.replace(self.path(draft.suffix))

    # ---------------------------------------------------------------- parts

    def tests(self) -> None:
        """pytest on the operators' tests, on the device."""
        what = "tests/ops/test_dispatch.py" if self.small else "tests/ops"
        start, budget = time.monotonic(), self.budget.until(SHARES["tests"])
        status, message = run_pytest(what, self.path("-tests.log"), budget.left(), parallel=not self.small)
        self.add_check(f"pytest {what}", status, message, time.monotonic() - start)

    def run_checks(self) -> None:
        """What only a GPU can show."""
        sizes = gpu_checks.SMALL if self.small else gpu_checks.FULL
        names = list(gpu_checks.checks(sizes))
        start = time.monotonic()
        for task, result in self._run([{"task": "check", "name": name} for name in names], "checks"):
            status = "failed" if "error" in result else result["status"]
            now = time.monotonic()
            self.add_check(task["name"], status, result.get("error") or result["message"], now - start)
            start = now
        self._not_run(names)

    def kernels(self) -> None:
        """The ceilings, then the operators."""
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

    # ---------------------------------------------------------------- findings

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
        error = row.details.get("error")
        found = ", ".join(f"{name} {samples.median:.4g} ms" for name, samples in row.results.items())
        print(f"{'failed' if error else 'timed':8} {row.name}: {error or found}", flush=True)
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
        """0 if everything ran and was right."""
        checks = all(check["status"] in ("passed", "skipped") for check in self.checks)
        rows = all("error" not in row.details for row in self.report.rows)
        complete = not any(note.startswith("out of time") for note in self.report.notes)
        return 0 if checks and rows and complete else 1


# ------------------------------------------------------------------ pytest


def run_pytest(what: str, log: Path, seconds: float, *, parallel: bool) -> tuple[str, str]:
    """Runs tests in a process of their own.

    Returns:
        "passed", "failed" or "not run", and the counts with the names of what failed.
    """
    if seconds <= 0:
        return "not run", "out of time"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", what, "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        if parallel and find_spec("xdist"):  # most of the time is the compiler's, on the CPU
            command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        late = ""
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = f"stopped after {seconds:.0f} s; "
            process.send_signal(signal.SIGINT)  # pytest then writes what it has
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        counts = summarize(results.read_text(encoding="utf-8")) if results.exists() else "no results"
    passed = process.returncode == 0 and not late
    return ("passed" if passed else "failed"), late + counts + ("" if passed else f"; see {log.name}")


def summarize(xml: str) -> str:
    """ "12 passed, 1 failed, 2 skipped: test_a", from pytest's XML."""
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        names[outcome].append(case.get("name", ""))
    counts = ", ".join(f"{len(found)} {outcome}" for outcome, found in names.items() if found)
    return (counts or "no tests") + (f": {', '.join(names['failed'][:10])}" if names["failed"] else "")


# ------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if everything ran and was right, 1 if not, 2 without a GPU.

    Raises:
        ValueError: an unknown part, operator or shape.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results [{RESULTS.as_posix()}]")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything [10]")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas [{','.join(PARTS)}]")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="operators to time (default: all)")
    parser.add_argument(
        "--shape", default="v3,v2-lite,kimi-k2", help=f"among {', '.join(SCALES)}, with commas [%(default)s]"
    )
    parser.add_argument("--dry-run", action="store_true", help="try the command itself: tiny shapes, on the CPU")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device here; --dry-run tries the command on the CPU", file=sys.stderr)
        return 2
    parts = args.only.split(",")
    if not set(parts) <= set(PARTS):
        raise ValueError(f"expected parts among {', '.join(PARTS)}, got {args.only!r}")
    scales = ["tiny"] if args.dry_run else args.shape.split(",")
    settings = {"minutes": args.minutes, "parts": parts, "shapes": scales, "dry_run": args.dry_run}
    report = Report("kernels", settings, (), machine=describe_machine())
    budget = Budget(60 * args.minutes * _KEEP)
    out, work = args.out.resolve(), plan(select(args.op), scales)
    stem = "gpu-dry-run" if args.dry_run else f"gpu-{slug(report)}"
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{stem}-worker.log"
    log.write_text("", encoding="utf-8")
    with Worker("benchmarks.gpu.tasks", log) as worker:
        session = Session(out / stem, budget, args.dry_run, work, report, worker)
        session.save()
        steps = {"tests": session.tests, "checks": session.run_checks, "kernels": session.kernels}
        for part in PARTS:
            if part in parts:
                steps[part]()
    print(to_text(session.report))
    print(f"saved {session.path('.json')} and {session.path('.md').name} after {budget.spent():.0f} s")
    return session.status()
