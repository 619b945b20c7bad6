"""Tasks for the tests of `benchmarks.workers`: `python -m support.worker_tasks` is a worker of a few milliseconds."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.core.workers import work

turns = 0


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """Does what the task says; how many tasks this process had, to see when it was replaced."""
    global turns
    turns += 1
    match task["do"]:
        case "print":
            print("a kernel's own words")
        case "sleep":
            time.sleep(60)
        case "die":
            os._exit(7)
        case "fail" | "poison":
            raise ValueError(f"{task['do']}\nin two lines")
    return {"turn": turns}


if __name__ == "__main__":
    poisoned = False
    work(perform, healthy=lambda: turns != 3)
