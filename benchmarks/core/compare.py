"""Comparison of two reports of one benchmark: rows that got faster, regressed, or are gone."""

from __future__ import annotations

from dataclasses import dataclass

from .report import OURS, Report, Row, gain

__all__ = ["Change", "check_comparison", "compare", "machines_differ", "show_changes"]


@dataclass(frozen=True)
class Change:
    """One row in two reports.

    Attributes:
        gain: how many times better the new one is; None if they cannot be compared, for the reason in `note`.
    """

    name: str
    gain: float | None
    regressed: bool
    note: str = ""


def compare(old: Report, new: Report, *, tolerance: float = 0.1, by: str = "median") -> list[Change]:
    """Compares "ours" in the rows of two reports.

    A row that failed in the new report is a regression, and so is a row with a goal that is gone: otherwise a benchmark
    could hide a regression by no longer measuring it.

    Args:
        tolerance: a row regresses when it is worse than the old one by more than this fraction.
        by: "median" compares medians, for two runs on one machine; "ratio" compares the ratios to the baseline, for
            two machines, or two states of one.

    Raises:
        ValueError: no row can be compared, or an argument is out of range.
    """
    check_comparison(tolerance, by)
    before, after = ({(row.name, row.unit): row for row in report.rows} for report in (old, new))
    changes = [_changed(before.get(key), row, tolerance, by) for key, row in after.items()]
    changes += [_gone(row) for key, row in before.items() if key not in after]
    if all(change.gain is None for change in changes):
        names = [[row.name for row in report.rows] for report in (old, new)]
        raise ValueError(f"expected reports with rows that can be compared by {by}, got {names[0]} and {names[1]}")
    return changes


def check_comparison(tolerance: float, by: str | None) -> None:
    """Checks the arguments of a comparison before the minutes of measuring.

    Raises:
        ValueError: a negative tolerance, or an unknown measure.
    """
    if tolerance < 0 or by not in (None, "median", "ratio"):
        raise ValueError(f"expected tolerance >= 0 and by median or ratio, got {tolerance} and {by!r}")


def _changed(old: Row | None, new: Row, tolerance: float, by: str) -> Change:
    if old is None or OURS not in old.results:
        return Change(new.name, None, False, "only in the new report")
    if "error" in new.details:
        return Change(new.name, 0.0, True, f"failed: {new.details['error']}")
    if OURS not in new.results:
        return _gone(old)
    if by == "median":
        change = gain(old.results[OURS].median, new.results[OURS].median, new.better)
    else:
        first, second = old.ratio(), new.ratio()
        if first is None or second is None:
            return Change(new.name, None, False, "nothing to take a ratio to")
        change = second / first
    return Change(new.name, change, change < 1 / (1 + tolerance))


def _gone(old: Row) -> Change:
    """The change of a row that the new report lacks, or that has no result of ours there."""
    has_goal = OURS in old.results and (old.goal is not None or "goal" in old.details)
    note = "only in the old report"
    return Change(old.name, None, has_goal, f"ERROR, a row with a goal is {note}" if has_goal else note)


def machines_differ(old: Report, new: Report) -> list[str]:
    """Returns the differences that make medians of two reports incomparable, as text."""
    # Times of a GPU do not depend on the processor beside it.
    gpu = old.machine.get("gpu") is not None and new.machine.get("gpu") is not None
    facts = ("gpu",) if gpu else ("gpu", "cpu", "cpu_capability", "threads")
    pairs = [(name, old.machine.get(name), new.machine.get(name)) for name in facts]
    pairs.append(("device", old.settings.get("device"), new.settings.get("device")))
    return [f"different {name}: {first} and {second}" for name, first, second in pairs if first != second]


def show_changes(old: Report, new: Report, *, tolerance: float = 0.1, by: str | None = None) -> int:
    """Prints the changes that `compare` finds and how many rows regressed.

    Args:
        by: as for `compare`; None for medians if both ran on one machine, else ratios.

    Returns:
        the exit status: 1 if anything regressed.
    """
    different = machines_differ(old, new)
    versions = [report.machine.get("torch") for report in (old, new)]
    newer = [] if versions[0] == versions[1] else [f"different torch: {versions[0]} and {versions[1]}"]
    for line in [*different, *newer]:
        print(line)
    by = by or ("ratio" if different else "median")
    changes = compare(old, new, tolerance=tolerance, by=by)
    measure = "medians" if by == "median" else "ratios to the baseline"
    print(f"times better than the report of {old.date}, by {measure}:")
    for change in changes:
        times = "      - " if change.gain is None else f"{change.gain:6.2f}x "
        mark = "  REGRESSION" if change.regressed and change.gain is not None else ""
        print(f"{times} {change.name}{mark}{': ' if change.note else ''}{change.note}")
    regressed = sum(change.regressed for change in changes)
    measured = sum(change.gain is not None for change in changes)
    print(f"{measured} compared, {regressed} regressed by more than {tolerance:.0%} or gone")
    return 1 if regressed else 0
