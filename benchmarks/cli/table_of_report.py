"""Prints a report as a Markdown table, or puts the table into a document.

There it stands between the lines `<!-- begin PATH -->` and `<!-- end PATH -->` with the path of the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..core.report import Report
from ..core.tables import Table, summary_table
from ..operators.tables import is_of_kernels, kernel_table

__all__ = ["Settings", "main", "refresh_document", "table_of"]


@dataclass(frozen=True)
class Settings:
    """A report, and the document that shows it."""

    report: Annotated[Path, "a report"]
    into: Annotated[Path | None, "replace the table of this report in a document, instead of printing it"] = None


def table_of(report: Report) -> Table:
    """Returns the table of any report."""
    return kernel_table(report) if is_of_kernels(report) else summary_table(report)


def refresh_document(text: str, path: str, report: Report) -> str:
    """Returns the document `text` with the table of `report` between the lines that name its `path`.

    Raises:
        ValueError: the document has no such lines.
    """
    begin, end = f"<!-- begin {path} -->\n", f"<!-- end {path} -->\n"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"expected a document with the lines {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{table_of(report).to_markdown()}{end}{after}"


def main(settings: Settings) -> int:
    """Runs the command `table`."""
    report = Report.load(settings.report)
    if settings.into is None:
        print(table_of(report).to_markdown(), end="")
    else:
        text = settings.into.read_text(encoding="utf-8")
        settings.into.write_text(refresh_document(text, settings.report.as_posix(), report), encoding="utf-8")
    return 0
