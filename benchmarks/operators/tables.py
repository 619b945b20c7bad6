"""The table of a report of operators: one line for each operator, shape and provider."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..core.report import OURS, Report, Row, Samples
from ..core.tables import Table, title_of
from .goals import Goal
from .rooflines import Ceilings

__all__ = ["LEGEND", "is_of_kernels", "kernel_table", "lines", "remarks"]

HEAD = (
    "operator",
    "shape",
    "provider",
    "ms (p10 - p90)",
    "first call s",
    "TFLOP/s",
    "GB/s",
    "% of roofline",
    "x built-in",
    "goal",
)
LEGEND = (
    "first call: all of a contestant's first call at this shape, nothing subtracted: imports, compiling what neither "
    "this process nor a cache on disk has, warming up; the ms are of later calls; "
    "% of roofline: the least time that bytes and FLOPs allow at the measured ceilings, over the time; "
    "x built-in: the fastest torch built-in's time over ours; goals are for an H200"
)


def is_of_kernels(report: Report) -> bool:
    """Returns True for a report of the commands `kernels` and `gpu`."""
    return report.benchmark == "kernels"


def kernel_table(report: Report) -> Table:
    """Returns the table of a report of operators."""
    return Table(title_of(report), list(lines(report)), labels=3, remarks=remarks(report))


def lines(report: Report) -> Iterable[tuple[str, ...]]:
    """Yields the titles, then a line for each provider of each row that has results."""
    measured = report.facts.get("ceilings")
    ceilings = Ceilings.from_dict(measured) if measured else None
    yield HEAD
    for row in report.rows:
        for place, (name, samples) in enumerate(row.results.items()):
            first = (row.details["op"], row.details["shape"]) if place == 0 else ("", "")
            yield (*first, *_cells(row, name, samples, ceilings))


def _cells(row: Row, name: str, samples: Samples, ceilings: Ceilings | None) -> tuple[str, ...]:
    flops, moved = row.details["flops"], row.details["bytes"]
    seconds = samples.median / 1e3
    share = "" if ceilings is None else f"{ceilings.floor(flops, moved, row.details['product']) / seconds:.1%}"
    ours = name == OURS
    ratio = row.ratio() if ours else None
    # The implementation that ran: our call on a GPU may have fallen back to the reference, which is slow.
    label = f"{name} ({row.details['runs']})" if ours else name
    first = row.details.get("first_call_s", {}).get(name)
    return (
        label,
        f"{samples.median:.4g} ({samples.p10:.4g} - {samples.p90:.4g})",
        "" if first is None else f"{first:.3g}",
        f"{flops / seconds / 1e12:.4g}" if flops else "",
        f"{moved / seconds / 1e9:.4g}",
        share,
        "" if ratio is None else f"{ratio:.2f}x",
        _goal(row, seconds) if ours else "",
    )


def _goal(row: Row, seconds: float) -> str:
    if "goal" not in row.details:
        return ""
    goal = Goal(**row.details["goal"])
    reached = goal.reached(seconds, row.details["flops"], row.details["bytes"])
    return f"{reached.upper() if reached else 'MISSED'} ({goal.describe()})"


def remarks(report: Report) -> list[str]:
    """Returns the failures, the absent providers with the reason, the legend and the report's own notes."""
    text = _check_remarks(report)
    text += [f"FAILED {row.name}: {row.details['error']}" for row in report.rows if "error" in row.details]
    absent: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        for name, why in row.details.get("absent", {}).items():
            # Only the first sentence: the rest names the sizes, which differ from row to row.
            absent.setdefault((name, why.partition(". ")[0]), []).append(row.name)
    text += [f"no {name}: {why} ({len(rows)}x, first {rows[0]})" for (name, why), rows in absent.items()]
    return [*text, LEGEND, *report.notes]


def _check_remarks(report: Report) -> list[str]:
    checks = report.facts.get("checks", [])
    counts = Counter(check["status"] for check in checks)
    text = ["checks: " + ", ".join(f"{count} {status}" for status, count in counts.items())] if checks else []
    notable = (check for check in checks if check["status"] != "passed")
    return text + [f"{check['status'].upper()} {check['name']}: {check['message']}" for check in notable]
