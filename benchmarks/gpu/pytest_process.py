"""pytest in a process of its own, with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from ..core.workers import ROOT, environment

__all__ = ["run_pytest", "summarize"]


def run_pytest(what: str, log: Path, seconds: float, *, parallel: bool) -> tuple[str, str]:
    """Runs tests and returns "passed", "failed" or "not run", and the counts with the names of failed tests."""
    if seconds <= 0:
        return "not run", "out of time"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as output:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", what, "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        if parallel and find_spec("xdist"):  # most of the time is spent in the compiler, on the CPU
            command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        late = ""
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = f"stopped after {seconds:.0f} s; "
            process.send_signal(signal.SIGINT)  # pytest then writes the results so far
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        counts = summarize(results.read_text(encoding="utf-8")) if results.exists() else "no results"
    passed = process.returncode == 0 and not late
    return ("passed" if passed else "failed"), late + counts + ("" if passed else f"; see {log.name}")


def summarize(xml: str) -> str:
    """Returns the counts of pytest's XML and failed tests, as in "12 passed, 1 failed, 2 skipped: test_a"."""
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        names[outcome].append(case.get("name", ""))
    counts = ", ".join(f"{len(tests)} {outcome}" for outcome, tests in names.items() if tests)
    return (counts or "no tests") + (f": {', '.join(names['failed'][:10])}" if names["failed"] else "")
