"""Parts of all figures of operators: colours and markers of contestants, legend, caption, names of rows.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Each contestant has its own marker
as well, filled for ours and hollow for the others, so that a figure can be printed in black and white.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.machine import machine_line
from ..core.report import OURS, Report, Row
from .rooflines import Ceilings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["CEILING", "COLUMNS", "GREY", "MINE", "MINE_PALE", "Look", "Page", "looks_of", "names_of", "rate"]

WIDTH = 7.0  # inches: the text of a page
COLUMNS = 148  # characters that fit below a figure
MINE, MINE_PALE, GREY = "#0072B2", "#A9CFE8", "#666666"
CEILING: dict[str, Any] = {"color": GREY, "linewidth": 1, "linestyle": (0, (4, 2))}
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "s^Dv<>ph"


@dataclass(frozen=True)
class Look:
    """Colour and marker of a contestant, the same in every figure of one report."""

    color: str
    marker: str
    filled: bool

    def marks(self, size: float = 5.0) -> dict[str, Any]:
        face = self.color if self.filled else "white"
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": face,
            "markeredgewidth": 1.0,
        }


def looks_of(rows: Iterable[Row]) -> dict[str, Look]:
    """Returns the colour and marker of every contestant in the rows."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.results) if name != OURS]
    looks = {OURS: Look(MINE, "o", filled=True)}
    for place, name in enumerate(names):
        looks[name] = Look(_OTHERS[place % len(_OTHERS)], _MARKERS[place % len(_MARKERS)], filled=False)
    return looks


@dataclass(frozen=True)
class Page:
    """Report, ceilings and looks for the figures of one report."""

    report: Report
    ceilings: Ceilings | None
    looks: Mapping[str, Look]

    def figure(self, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        return figure, axes

    def finish(
        self, figure: Figure, title: str, rows: Iterable[Row], more: Sequence[Line2D] = (), key: str = ""
    ) -> Figure:
        """Adds the title and the contestants above; below, the key to any numbers and the machine.

        Args:
            more: lines for the legend after the contestants.
        """
        from matplotlib.lines import Line2D

        there = {name for row in rows for name in row.results}
        looks = {name: look for name, look in self.looks.items() if name in there}
        handles = [Line2D([], [], linestyle="", label=name, **look.marks()) for name, look in looks.items()]
        figure.legend(
            handles=[*handles, *more],
            loc="outside upper left",
            ncols=6,
            title=title,
            alignment="left",
            title_fontproperties={"weight": "bold", "size": 9},
            handletextpad=0.3,
            columnspacing=1.4,
            borderpad=0,
        )
        machine = "\n".join(textwrap.wrap(f"{machine_line(self.report.machine)}; {self.report.date}", COLUMNS))
        text = "\n\n".join(filter(None, (key, machine)))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=5.5, family="monospace", color="#333333", linespacing=1.35)
        return figure


def names_of(rows: Sequence[Row]) -> list[str]:
    """Returns names that distinguish the rows of one scale, without sizes if those are not needed."""
    full = [f"{row.details['op']} {row.details['shape'].partition(' ')[2]}" for row in rows]
    short = [re.sub(r"[\s,]+$", "", re.sub(r"\s*\b\d+(x\d+)+\b", "", name, count=1)) for name in full]
    return [short[i] if short.count(short[i]) == 1 else full[i] for i in range(len(rows))]


def rate(row: Row, ms: float) -> float:
    """Returns TFLOP/s, or GB/s of an operator without FLOPs, for a time of `ms`."""
    flops = row.details["flops"]
    return (flops / 1e12 if flops else row.details["bytes"] / 1e9) / (ms / 1e3)
