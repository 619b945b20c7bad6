"""Figures of a report of operators at the size of a page: rooflines, bandwidths, sweeps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.report import OURS, Report, Row
from .figure_parts import CEILING, MINE, MINE_PALE, Look, Page, looks_of, names_of, rate
from .label_layout import plain_ticks
from .roofline_figure import roofline_figure
from .rooflines import Ceilings
from .tables import is_of_kernels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "require_matplotlib"]

_STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "ytick.minor.size": 1.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "savefig.dpi": 220,
}


def require_matplotlib() -> None:
    """Raises `ValueError` where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("expected matplotlib for figures, got none: pip install 'deepseek-arch[plot]'")


def draw(report: Report, folder: str | Path) -> list[Path]:
    """Writes PNG files with the figures of every scale for which `report` has rows.

    `roofline-SCALE.png` shows the operators that compute, `bandwidth-SCALE.png` those that only move bytes, and
    `sweep-SCALE-OPERATOR-NAME.png` one curve of each contestant over one size.

    Raises:
        ValueError: matplotlib is not installed, or the report is of another benchmark or has no results.
    """
    require_matplotlib()
    if not is_of_kernels(report):
        raise ValueError(f"expected a report of kernels to draw, got one of {report.benchmark}")
    rows = [row for row in report.rows if row.results]
    if not rows:
        raise ValueError("expected a report with results to draw, got none")
    import matplotlib

    measured = report.facts.get("ceilings")
    page = Page(report, Ceilings.from_dict(measured) if measured else None, looks_of(rows))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in _figures(page, rows):
            paths.append(folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', name)}.png")
            figure.savefig(paths[-1])
    return paths


def _figures(page: Page, rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    for scale in dict.fromkeys(_scale(row) for row in rows):
        here = [row for row in rows if _scale(row) == scale]
        plain = [row for row in here if "sweep" not in row.details]
        if computing := [row for row in plain if row.details["flops"]]:
            yield f"roofline-{scale}", roofline_figure(page, scale, computing)
        if moving := [row for row in plain if not row.details["flops"]]:
            yield f"bandwidth-{scale}", _bandwidth(page, scale, moving)
        curves: dict[tuple[str, str], list[Row]] = {}
        for row in here:
            if "sweep" in row.details:
                curves.setdefault((row.details["op"], row.details["shape"].rpartition(", ")[0]), []).append(row)
        for (op, name), points in curves.items():
            yield f"sweep-{scale}-{op}-{name.partition(' ')[2]}", _sweep(page, f"{op}: {name}", points)


def _scale(row: Row) -> str:
    return row.details["shape"].partition(" ")[0]


# ------------------------------------------------------------------ bandwidths


def _bandwidth(page: Page, scale: str, rows: list[Row]) -> Figure:
    """A bar for ours, with the 10th and the 90th percentile, and markers for the others."""
    figure, (axes,) = page.figure(1.4 + 0.2 * len(rows))
    for place, row in enumerate(rows):
        for name, samples in row.results.items():
            speed, look = rate(row, samples.median), page.looks[name]
            if name == OURS:
                spread = [[speed - rate(row, samples.p90)], [rate(row, samples.p10) - speed]]
                bar = {"color": MINE_PALE, "edgecolor": MINE, "linewidth": 0.7}
                axes.barh(place, speed, 0.64, xerr=spread, ecolor=MINE, capsize=1.5, **bar)
                axes.plot([speed], [place], linestyle="", zorder=5, **look.marks(3.5))
            else:
                axes.plot([speed], [place], linestyle="", zorder=4, **look.marks(4.5))
    axes.set_yticks(range(len(rows)), names_of(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="GB/s")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    more = []
    if page.ceilings:
        copy = page.ceilings.copy / 1e9
        more.append(axes.axvline(copy, label=f"copy, {copy:,.4g} GB/s", **CEILING))
    axes.set_xlim(left=0)
    return page.finish(figure, f"Bandwidth, {scale}", rows, more)


# ------------------------------------------------------------------ sweeps


def _sweep(page: Page, title: str, rows: list[Row]) -> Figure:
    """Speed and time over the size: a line for each contestant, with a band from the 10th to the 90th percentile."""
    rows = sorted(rows, key=lambda row: row.details["size"])
    sizes = [row.details["size"] for row in rows]
    figure, panels = page.figure(3.0, columns=2)
    for axes, quantity in zip(panels, (rate, _microseconds), strict=True):
        for name, look in page.looks.items():
            _curve(axes, [row for row in rows if name in row.results], name, look, quantity)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        ticks = sizes[:: math.ceil(len(sizes) / 8)]
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.tick_params(axis="x", which="minor", length=0)
        axes.set_xlabel(rows[0].details["sweep"])
    panels[0].set_ylabel("TFLOP/s" if rows[0].details["flops"] else "GB/s")
    panels[1].set_ylabel(r"time ($\mu$s)")
    more = []
    if page.ceilings:
        floors = [1e3 * page.ceilings.floor(r.details["flops"], r.details["bytes"], r.details["product"]) for r in rows]
        for axes, quantity in zip(panels, (rate, _microseconds), strict=True):
            best = [quantity(row, ms) for row, ms in zip(rows, floors, strict=True)]
            more = axes.plot(sizes, best, label="measured ceilings", zorder=2, **CEILING)
    return page.finish(figure, title, rows, more)


def _curve(axes: Axes, rows: Sequence[Row], name: str, look: Look, quantity: Callable[[Row, float], float]) -> None:
    if not rows:
        return
    sizes = [row.details["size"] for row in rows]
    low, middle, high = (
        [quantity(row, getattr(row.results[name], part)) for row in rows] for part in ("p10", "median", "p90")
    )
    axes.fill_between(sizes, low, high, color=look.color, alpha=0.2, linewidth=0)
    axes.plot(sizes, middle, zorder=3 + (name == OURS), **look.marks(3.8))


def _microseconds(row: Row, ms: float) -> float:
    return 1e3 * ms
