"""Tables of results as aligned text for a terminal and as Markdown."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .machine import machine_line
from .report import Report, Row, Samples

__all__ = ["Table", "print_progress", "progress_line", "show_and_save", "summary_table", "title_of"]


@dataclass(frozen=True)
class Table:
    """A table with the command and machine above it and remarks below.

    Attributes:
        rows: cells; the first row has the titles.
        labels: how many of the first columns hold text, which is aligned to the left.
    """

    title: str
    rows: Sequence[Sequence[str]]
    labels: int
    remarks: Sequence[str]

    def to_text(self) -> str:
        """Returns aligned columns for a terminal."""
        widths = [max(map(_width, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(self._aligned(row, widths)).rstrip() for row in self.rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, "", *self.remarks, self.title])

    def _aligned(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            fill = " " * (width - _width(cell))
            yield cell + fill if place < self.labels else fill + cell

    def to_markdown(self) -> str:
        head, *rows = self.rows
        rule = ["---" if place < self.labels else "---:" for place in range(len(head))]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
        return f"{self.title}\n\n{table}\n\n" + "".join(f"- {remark}\n" for remark in self.remarks)


def _width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def title_of(report: Report) -> str:
    """Returns the command, the machine and the date of a report."""
    return f"`{report.command}` on {machine_line(report.machine)}; {report.date}"


def summary_table(report: Report) -> Table:
    """Returns a table with a column for each contestant: the median (10th to 90th percentile) of every row.

    Rows may have further cells: texts by column in the "columns" of their details.
    """
    names = list(dict.fromkeys(name for row in report.rows for name in row.results))
    more = list(dict.fromkeys(title for row in report.rows for title in row.details.get("columns", ())))
    rows = [("", *names, *more, "ratio", "goal"), *(_cells(row, names, more) for row in report.rows)]
    remarks = [*(f"{row.name}: {row.note}" for row in report.rows if row.note), *report.notes]
    return Table(title_of(report), rows, labels=1, remarks=remarks)


def _cells(row: Row, names: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    columns = row.details.get("columns", {})
    values = [_spread(row.results[name]) if name in row.results else "-" for name in names]
    ratio = row.ratio()
    times = "x" if row.baseline else ""
    goal = "" if row.goal is None else f"{row.goal:g}{times}"
    beside = [columns.get(title, "") for title in more]
    return (f"{row.name} ({row.unit})", *values, *beside, "" if ratio is None else f"{ratio:.2f}x", goal)


def _spread(samples: Samples) -> str:
    median = _number(samples.median)
    return median if len(samples.values) == 1 else f"{median} ({_number(samples.p10)} - {_number(samples.p90)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def progress_line(row: Row) -> str:
    """Returns one line for a row that has just been measured."""
    if "error" in row.details:
        return f"{row.name}: {row.details['error']}"
    medians = ", ".join(f"{name} {samples.median:.4g}" for name, samples in row.results.items())
    ratio = row.ratio()
    return f"{row.name} ({row.unit}): {medians}" + ("" if ratio is None else f": {ratio:.2f}x")


def print_progress(row: Row) -> None:
    """Prints a row that has just been measured, beside standard output."""
    print(progress_line(row), file=sys.stderr, flush=True)


def show_and_save(report: Report, path: str | Path) -> None:
    """Prints the summary of a report and writes its file."""
    print(summary_table(report).to_text())
    report.save(path)
    print(f"saved {path}")
