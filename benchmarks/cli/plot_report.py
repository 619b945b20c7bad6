"""Draws a report of operators as PNG files: roofline, bandwidth and sweeps of each scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..core.report import Report
from ..operators.plots import draw

__all__ = ["Settings", "main"]


@dataclass(frozen=True)
class Settings:
    """A report, and a folder for its figures."""

    report: Annotated[Path, "a report of `kernels` or `gpu`"]
    folder: Annotated[Path, "folder for the figures"]


def main(settings: Settings) -> int:
    """Runs the command `plot`."""
    for path in draw(Report.load(settings.report), settings.folder):
        print(f"saved {path}")
    return 0
