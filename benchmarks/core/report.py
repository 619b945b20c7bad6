"""Results of a benchmark and their file: samples, rows, the report.

A `Report` holds settings, the machine and rows. A `Row` is one quantity: the samples of each contestant, in one unit.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import describe_machine

__all__ = ["NATIVE", "OURS", "RESULTS", "Report", "Row", "Samples", "gain", "quantile"]

# Contestants that many benchmarks have.
OURS, NATIVE = "ours", "transformers"
RESULTS = Path("benchmarks") / "results"  # relative to the repository root


def quantile(values: Iterable[float], q: float) -> float:
    """Returns the `q`-quantile by linear interpolation between order statistics.

    Raises:
        ValueError: no values, or `q` outside [0, 1].
    """
    ordered = sorted(values)
    if not ordered or not 0 <= q <= 1:
        raise ValueError(f"expected values and a quantile between 0 and 1, got {len(ordered)} values and {q}")
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity.

    Raises:
        ValueError: no values, or one that is not finite.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"expected at least one finite value, got {self.values}")

    @property
    def median(self) -> float:
        return quantile(self.values, 0.5)

    @property
    def p10(self) -> float:
        return quantile(self.values, 0.1)

    @property
    def p90(self) -> float:
        return quantile(self.values, 0.9)

    def map(self, function: Callable[[float], float]) -> Samples:
        """Applies `function` to each value, for example to turn seconds into tokens per second."""
        return Samples(tuple(function(value) for value in self.values))

    def to_dict(self) -> dict[str, Any]:
        summary = {"median": self.median, "p10": self.p10, "p90": self.p90}
        return {key: _round(value, 5) for key, value in summary.items()} | {
            "samples": [_round(value, 5) for value in self.values]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Samples:
        return cls(tuple(float(value) for value in data["samples"]))


def _round(value: float, digits: int) -> float:
    """Keeps so many significant digits: below the noise of any measurement here, and the file stays readable."""
    return float(f"{value:.{digits}g}")


@dataclass(frozen=True)
class Row:
    """One quantity, measured for one or several contestants.

    Attributes:
        unit: of every sample.
        better: "lower" or "higher".
        results: samples by contestant; "ours" first.
        baseline: the contestant to which "ours" is compared.
        goal: the aim for `ratio()`, or for the value of "ours" itself if there is no baseline.
        note: a remark that a reader of the number needs.
        details: further facts, as JSON has them: for an operator its FLOPs, bytes, goal and absent contestants, or the
            "error" that left it without results; further cells of its line in a table, as "columns".

    Raises:
        ValueError: `better` is neither.
    """

    name: str
    unit: str
    better: str
    results: Mapping[str, Samples]
    baseline: str | None = None
    goal: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher"):
            raise ValueError(f"expected better to be lower or higher, got {self.better!r}")

    def ratio(self) -> float | None:
        """Returns how many times better the median of "ours" is than the baseline's; None if either is missing."""
        if self.baseline is None or not {OURS, self.baseline} <= set(self.results):
            return None
        return gain(self.results[self.baseline].median, self.results[OURS].median, self.better)

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(dataclasses.replace(self, results={}))
        if not self.details:
            del data["details"]
        ratio = self.ratio()
        results = {name: samples.to_dict() for name, samples in self.results.items()}
        return data | {"results": results, "ratio": None if ratio is None else _round(ratio, 4)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        fields = {name: value for name, value in data.items() if name not in ("results", "ratio")}
        return cls(results={name: Samples.from_dict(s) for name, s in data["results"].items()}, **fields)


def gain(old: float, new: float, better: str) -> float:
    """Returns how many times better `new` is than `old`."""
    return old / new if better == "lower" else new / old


def command_line() -> str:
    """Returns the command of this process as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = "benchmarks" if spec is None else spec.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


@dataclass(frozen=True)
class Report:
    """All results of one run of a benchmark.

    Attributes:
        facts: results that are no row, as JSON has them: measured ceilings, checks.
    """

    benchmark: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    command: str = field(default_factory=command_line)
    machine: Mapping[str, Any] = field(default_factory=describe_machine)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        data = dataclasses.asdict(dataclasses.replace(self, rows=())) | {"rows": [row.to_dict() for row in self.rows]}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads a file that `save` wrote, in this version or an earlier one.

        Raises:
            ValueError: the file is missing or no such report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(Row.from_dict(row) for row in data["rows"])
            return cls(**data | {"rows": rows, "notes": tuple(data["notes"])})
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a report of this harness in {path}, got {error!r}") from error
