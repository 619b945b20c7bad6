"""Compares two reports, and exits with 1 if a row regressed or is gone.

Two runs on one machine are compared by their medians, runs on two machines by the ratios to the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..core.compare import show_changes
from ..core.report import Report

__all__ = ["Settings", "main"]


@dataclass(frozen=True)
class Settings:
    """Two reports, and how much worse the new one may be."""

    old: Annotated[Path, "a report"]
    new: Annotated[Path, "a later report of the same benchmark"]
    tolerance: Annotated[float, "how much worse a row may be"] = 0.1
    by: Annotated[str | None, "median or ratio, to the baseline (default: median if both ran on one machine)"] = None


def main(settings: Settings) -> int:
    """Runs the command `compare`."""
    old, new = Report.load(settings.old), Report.load(settings.new)
    return show_changes(old, new, tolerance=settings.tolerance, by=settings.by)
