"""Reports for reading: a table in the terminal, the same in Markdown, and the one in a document refreshed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..operators.tables import is_of_kernels, lines, remarks, to_text
from .report import PACKAGES, Report

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["machine_line", "refresh_document", "show", "to_markdown", "to_table"]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cells(report: Report) -> Iterable[tuple[str, ...]]:
    names = _contestants(report)
    yield ("", *names, "ratio", "goal")
    for row in report.rows:
        cells = [f"{row.name} ({row.unit})"]
        for name in names:
            s = row.results.get(name)
            spread = "" if s is None or len(s.values) == 1 else f" ({_number(s.p10)} - {_number(s.p90)})"
            cells.append("-" if s is None else f"{_number(s.median)}{spread}")
        ratio = row.ratio()
        times = "x" if row.baseline else ""
        goal = "" if row.goal is None else f"{row.goal:g}{times}"
        yield (*cells, "" if ratio is None else f"{ratio:.2f}x", goal)


def _remarks(report: Report) -> list[str]:
    if is_of_kernels(report):
        return remarks(report)
    return [*(f"{row.name}: {row.note}" for row in report.rows if row.note), *report.notes]


def _contestants(report: Report) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row.results))


def machine_line(report: Report) -> str:
    m = report.machine
    versions = ", ".join(f"{name} {m[name]}" for name in PACKAGES if m.get(name))
    return f"{m['gpu'] or m['cpu']} ({m['cpu_capability']}), {m['threads']} threads; {versions}; {report.date}"


def to_table(report: Report) -> Table:
    """Medians (10th to 90th percentile) of every row, for a terminal."""
    from rich.table import Table  # a bare GPU machine has none, and prints Markdown only

    head, *rows = _cells(report)
    table = Table(title=report.command, caption=machine_line(report), caption_justify="left")
    for place, title in enumerate(head):
        table.add_column(title, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def to_markdown(report: Report) -> str:
    """The same table for a README."""
    head, *rows = lines(report) if is_of_kernels(report) else _cells(report)
    names = 3 if is_of_kernels(report) else 1  # columns of text
    rule = ("---" if place < names else "---:" for place in range(len(head)))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
    notes = "".join(f"- {remark}\n" for remark in _remarks(report))
    return f"`{report.command}` on {machine_line(report)}\n\n{table}\n\n{notes}"


def refresh_document(text: str, path: str, report: Report) -> str:
    """Puts the table of `report` between the lines `<!-- begin path -->` and `<!-- end path -->` of a document.

    Raises:
        ValueError: the document has no such lines.
    """
    begin, end = f"<!-- begin {path} -->\n", f"<!-- end {path} -->\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected a document with the lines {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{to_markdown(report)}{end}{after}"


def show(report: Report) -> None:
    if is_of_kernels(report):
        print(to_text(report))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(to_table(report))
    for remark in _remarks(report):
        console.print(remark, highlight=False, markup=False)
