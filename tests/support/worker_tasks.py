"""Tasks for the tests of `benchmarks.core.workers`, run as `python -m support.worker_tasks`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.core.workers import work

turns = 0


def perform(task: dict[str, Any]) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """Performs the task; its result counts the tasks of this process, which shows when it was replaced."""
    global turns
    turns += 1
    kind = task["do"]
    if kind.startswith("print"):
        print("a kernel's own words")
    match kind:
        case "sleep":
            time.sleep(60)
        case "die":
            os._exit(7)
        case "fail" | "poison" | "print and fail":
            raise ValueError(f"{kind.removeprefix('print and ')}\nin two lines")
        case "three" | "three, then sleep":
            return three(kind)
    return {"turn": turns}


def three(kind: str) -> Iterator[dict[str, Any]]:
    for turn in (1, 2, 3):
        yield {"turn": turn}
    if kind != "three":
        time.sleep(60)


if __name__ == "__main__":
    work(perform, healthy=lambda: turns != 3)
