"""What every benchmark shares: interleaved timing, quantiles, the machine it ran on, the JSON file.

A result is a `Report`: settings, machine, and rows. A row holds the samples of each contestant under one name and unit.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "NATIVE",
    "OURS",
    "PACKAGES",
    "Report",
    "Row",
    "Samples",
    "gain",
    "interleave",
    "load_average",
    "machine",
    "quantile",
    "sample_times",
]

# Contestants that many benchmarks have.
OURS, NATIVE = "ours", "transformers"
PACKAGES = ("deepseek-arch", "torch", "triton", "transformers", "safetensors")


# ------------------------------------------------------------------ samples


def quantile(values: Iterable[float], q: float) -> float:
    """The `q`-quantile by linear interpolation between order statistics.

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
    """The repeated measurements of one quantity."""

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
        """Each value through `function`: seconds to tokens a second, and so on."""
        return Samples(tuple(function(value) for value in self.values))

    def to_dict(self) -> dict[str, Any]:
        summary = {"median": self.median, "p10": self.p10, "p90": self.p90, "samples": self.values}
        return {key: _round(value) for key, value in summary.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Samples:
        return cls(tuple(float(value) for value in data["samples"]))


def _round(value):
    """Five significant digits: below the noise of any measurement here, and files that a person can read."""
    return [_round(v) for v in value] if isinstance(value, tuple) else float(f"{value:.5g}")


# ------------------------------------------------------------------ timing


SLOW = 10.0  # seconds from which a run counts even as a warm-up: what warming up saves is small beside it


def interleave(
    actions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, budget_s: float = math.inf
) -> dict[str, Samples]:
    """Seconds of each action, run A, B, A, B, ..., so that a slow minute of the machine meets all of them.

    Args:
        actions: by contestant. On a GPU each must synchronize before it returns.
        rounds: counted runs of each, at most.
        warmup: runs before them that do not count, unless they are slow.
        budget_s: an action with a counted run is not run again if that would bring its total, warm-up included, over
            this.
    """
    spent = dict.fromkeys(actions, 0.0)
    last = dict.fromkeys(actions, 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        for name, action in actions.items():
            done = seconds[name]
            if done and (len(done) == rounds or spent[name] + last[name] > budget_s):
                continue
            last[name] = _time(action)
            spent[name] += last[name]
            if turn >= warmup or last[name] >= SLOW:
                done.append(last[name])
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def sample_times(action: Callable[[], object], *, rounds: int, warmup: int = 1) -> Samples:
    """Seconds of one action alone."""
    return interleave({OURS: action}, rounds=rounds, warmup=warmup)[OURS]


def _time(action: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whoever allocated last
    try:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    finally:
        gc.enable()


# ------------------------------------------------------------------ where it ran


def machine() -> dict[str, Any]:
    """Processor, threads and versions: what a reader needs to judge a number."""
    line: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
    return line | {name: _version(name) for name in PACKAGES}


def load_average() -> str:
    """Processes that wanted a core in the last minute: anything but about 0 spoils a measurement."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------ reports


@dataclass(frozen=True)
class Row:
    """One quantity, measured for one or several contestants.

    Attributes:
        unit: of every sample.
        better: "lower" or "higher".
        results: samples by contestant; "ours" first.
        goal: how many times better than `baseline` "ours" is meant to be, or the value meant if there is no baseline.
        note: what a reader of the number must know.
        details: what else is known, as JSON has it: for an operator its FLOPs, bytes, goal and who is absent and why,
            or the "error" that left it without results.
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
        """How many times better the median of "ours" is than the baseline's; None without either."""
        if self.baseline is None or not {OURS, self.baseline} <= set(self.results):
            return None
        return gain(self.results[self.baseline].median, self.results[OURS].median, self.better)

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(dataclasses.replace(self, results={}))
        if not self.details:
            del data["details"]
        return data | {"results": {n: s.to_dict() for n, s in self.results.items()}, "ratio": _rounded(self.ratio())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        fields = {name: value for name, value in data.items() if name not in ("results", "ratio")}
        return cls(results={name: Samples.from_dict(s) for name, s in data["results"].items()}, **fields)


def gain(old: float, new: float, better: str) -> float:
    """How many times better `new` is than `old`."""
    return old / new if better == "lower" else new / old


@dataclass(frozen=True)
class Report:
    """Everything one run of a benchmark found.

    Attributes:
        facts: findings that are no row, as JSON has them: measured ceilings, checks.
    """

    benchmark: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    command: str = field(default_factory=lambda: command_line())
    machine: Mapping[str, Any] = field(default_factory=machine)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        data = dataclasses.asdict(dataclasses.replace(self, rows=())) | {"rows": [row.to_dict() for row in self.rows]}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is missing or no such report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(Row.from_dict(row) for row in data["rows"])
            return cls(**data | {"rows": rows, "notes": tuple(data["notes"])})
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a report of this harness in {path}, got {error!r}") from error


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def command_line() -> str:
    """The command of this process as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = "benchmarks" if spec is None else spec.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
