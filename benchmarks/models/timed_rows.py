"""Rows of times: each contestant's seconds on both clocks, beside llama.cpp's and the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.machine import load_average
from ..core.report import NATIVE, OURS, Row, Samples, gain
from ..core.timing import Clocked
from .limits import ModelCeilings, Work
from .llama_bench import LLAMA
from .model_settings import GOALS

__all__ = ["Times", "ran_fewer"]


def ran_fewer(seconds: Mapping[str, Clocked], rounds: int, what: str) -> str:
    """Returns a remark on contestants that had too little time for all rounds, or nothing."""
    counts = {name: len(one.wall.values) for name, one in seconds.items()}
    short = [f"{name} {count} of {rounds} {what}" for name, count in counts.items() if count < rounds]
    return f"out of time after: {', '.join(short)}" if short else ""


@dataclass
class Times:
    """Times and remarks of one row.

    Attributes:
        seconds: of each contestant of this process, of one step, prompt or run.
        others: seconds by the wall of contestants in processes of their own.
        remarks: what a reader of the row has to know.
    """

    name: str
    seconds: Mapping[str, Clocked]
    others: dict[str, Samples] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, samples: Samples | str) -> None:
        """Adds a contestant of another process, or the reason why it has no time."""
        if isinstance(samples, str):
            self.remarks.append(samples)
        else:
            self.others[name] = samples

    def to_row(
        self,
        unit: str,
        better: str,
        convert: Callable[[float], float],
        *,
        goals: bool,
        baseline: str = NATIVE,
        limit: tuple[ModelCeilings, Work, str] | None = None,
    ) -> Row:
        """Returns the row in `unit`.

        Args:
            convert: from seconds to the unit.
            goals: the settings are those for which `GOALS` were set.
            limit: the ceilings, the work of what was timed, and the dtype of its products.
        """
        wall = {name: one.wall for name, one in self.seconds.items()} | self.others
        results = {name: samples.map(convert) for name, samples in wall.items()}
        cpu = {name: one.cpu.median for name, one in self.seconds.items()}
        details: dict[str, Any] = {"cpu_seconds": cpu, "load": load_average()}
        columns = {"ours, CPU": f"{cpu[OURS]:.3g} s"} if OURS in cpu else {}
        if {OURS, baseline} <= set(cpu):
            columns["ratio in CPU time"] = f"{cpu[baseline] / cpu[OURS]:.2f}x"
        if {OURS, LLAMA} <= set(results):
            columns[f"to {LLAMA}"] = f"{gain(results[LLAMA].median, results[OURS].median, better):.2f}x"
        if limit is not None and OURS in wall:
            ceilings, work, dtype = limit
            least = ceilings.seconds(work, dtype)
            details |= {"bytes": work.moved, "flops": work.flops, "least_s": least}
            columns["of the limit"] = f"{least / wall[OURS].median:.0%}"
        goal = GOALS.get(self.name) if goals else None
        note = "; ".join(filter(None, self.remarks))
        return Row(self.name, unit, better, results, baseline, goal, note, details | {"columns": columns})
