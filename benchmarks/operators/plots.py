"""Figures of a report of operators at the size of a page: rooflines, bandwidths, sweeps.

Colours are Okabe and Ito's, which colour-blind readers tell apart; each contestant has its own marker as well, filled
for ours and hollow for the others, so that a figure survives a black and white printer.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.report import OURS, Report, Row
from .label_layout import Label, line_boxes, place_labels, plain_ticks
from .rooflines import Ceilings
from .tables import is_of_kernels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

__all__ = ["draw", "require_matplotlib"]

WIDTH = 7.0  # inches: the text of a page
_MOST_NAMES = 8  # that fit into a roofline; more are numbered, with a key beside it
_MINE, _MINE_PALE = "#0072B2", "#A9CFE8"
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "s^Dv<>ph"
_GREY = "#666666"
_COLUMNS = 148  # characters that fit below a figure
_CEILING: dict[str, Any] = {"color": _GREY, "linewidth": 1, "linestyle": (0, (4, 2))}
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
    """Writes the figures of every scale in `report`, as far as it has rows for them, as PNG files.

    `roofline-SCALE.png` has the operators that compute, `bandwidth-SCALE.png` those that only move bytes, and
    `sweep-SCALE-OPERATOR-NAME.png` is one curve of each contestant over one size.

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

    found = report.facts.get("ceilings")
    page = Page(report, Ceilings.from_dict(found) if found else None, _looks(rows))
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
            yield f"roofline-{scale}", _roofline(page, scale, computing)
        if moving := [row for row in plain if not row.details["flops"]]:
            yield f"bandwidth-{scale}", _bandwidth(page, scale, moving)
        curves: dict[tuple[str, str], list[Row]] = {}
        for row in here:
            if "sweep" in row.details:
                curves.setdefault((row.details["op"], row.details["shape"].rpartition(", ")[0]), []).append(row)
        for (op, name), points in curves.items():
            yield f"sweep-{scale}-{op}-{name.partition(' ')[2]}", _sweep(page, f"{op}: {name}", points)


# ------------------------------------------------------------------ what all figures share


@dataclass(frozen=True)
class Look:
    """How a contestant is drawn, in every figure of one report."""

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


def _looks(rows: Iterable[Row]) -> dict[str, Look]:
    names = [name for name in dict.fromkeys(name for row in rows for name in row.results) if name != OURS]
    looks = {OURS: Look(_MINE, "o", filled=True)}
    for place, name in enumerate(names):
        looks[name] = Look(_OTHERS[place % len(_OTHERS)], _MARKERS[place % len(_MARKERS)], filled=False)
    return looks


@dataclass(frozen=True)
class Page:
    """What the figures of one report have in common."""

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
        """Title and contestants above; below, what it was measured on, after the key to any numbers.

        Args:
            more: lines for the legend after the contestants.
        """
        from matplotlib.lines import Line2D

        from ..core.tables import machine_line

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
        machine = "\n".join(textwrap.wrap(machine_line(self.report), _COLUMNS))
        text = "\n\n".join(filter(None, (key, machine)))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=5.5, family="monospace", color="#333333", linespacing=1.35)
        return figure


def _scale(row: Row) -> str:
    return row.details["shape"].partition(" ")[0]


def _names(rows: Sequence[Row]) -> list[str]:
    """What tells the rows of one scale apart, without sizes where it does."""
    full = [f"{row.details['op']} {row.details['shape'].partition(' ')[2]}" for row in rows]
    short = [re.sub(r"[\s,]+$", "", re.sub(r"\s*\b\d+(x\d+)+\b", "", name, count=1)) for name in full]
    return [short[i] if short.count(short[i]) == 1 else full[i] for i in range(len(rows))]


def _rate(row: Row, ms: float) -> float:
    """TFLOP/s, or GB/s of what computes nothing."""
    flops = row.details["flops"]
    return (flops / 1e12 if flops else row.details["bytes"] / 1e9) / (ms / 1e3)


# ------------------------------------------------------------------ rooflines


def _roofline(page: Page, scale: str, rows: list[Row]) -> Figure:
    rows = sorted(rows, key=_intensity)
    names = _names(rows)
    key = _key(names) if len(rows) > _MOST_NAMES else ""
    figure, (axes,) = page.figure(4.3 + 0.11 * key.count("\n"))
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s")
    marks = [(name, _intensity(row), _rate(row, s.median)) for row in rows for name, s in row.results.items()]
    for name, x, y in marks:
        axes.plot([x], [y], linestyle="", zorder=3 + (name == OURS), **page.looks[name].marks(4.5))
    speeds, left, right = [y for *_, y in marks], _intensity(rows[0]) / 2, _intensity(rows[-1]) * 2
    if page.ceilings:
        speeds += [speed / 1e12 for speed in page.ceilings.products.values()]
        # A piece of the slope is always there; down to its end at the left, but not much lower than any mark.
        left = min(left, max(page.ceilings.products.values(), default=math.inf) / page.ceilings.copy / 4)
        speeds.append(max(left * page.ceilings.copy / 1e12, min(speeds) / 2))
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set(xlim=(left, right), ylim=(min(speeds) / 1.6, max(speeds) * 1.6))
    page.finish(figure, f"Roofline, {scale}", rows, key=key)
    # From here on nothing may move: what is placed now, or turned by an angle, would not fit after another layout.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    taken = _draw_ceilings(axes, page.ceilings) if page.ceilings else []
    labels = []
    for place, row in enumerate(rows):
        best = row.results.get(OURS) or next(iter(row.results.values()))
        labels.append(Label(_intensity(row), _rate(row, best.median), str(place + 1) if key else names[place]))
    place_labels(axes, labels, [(x, y) for _, x, y in marks], taken, color="#111111", fontsize=6.5)
    return figure


def _intensity(row: Row) -> float:
    return row.details["flops"] / row.details["bytes"]


def _draw_ceilings(axes: Axes, ceilings: Ceilings) -> list[Bbox]:
    """The slope of a copy and the level of each product; the names are above the slope, where no mark can be.

    Returns:
        the pixels that lines and names take.
    """
    (left, right), (low, _) = axes.get_xlim(), axes.get_ylim()
    copy = ceilings.copy / 1e12
    levels = {kind: speed / 1e12 for kind, speed in ceilings.products.items()}
    corners = {kind: min(max(level / copy, left), right) for kind, level in levels.items()}
    start, end = max(left, low / copy), max(corners.values(), default=right)
    line: dict[str, Any] = {"color": _GREY, "linewidth": 1, "zorder": 1}
    axes.plot([start, end], [start * copy, end * copy], **line)
    taken = line_boxes(axes, (start, start * copy), (end, end * copy))
    (x0, y0), (x1, y1) = axes.transData.transform([(start, start * copy), (end, end * copy)])
    note: dict[str, Any] = {"color": _GREY, "fontsize": 6.5, "textcoords": "offset points", "va": "bottom"}
    # Below the first corner, which has a name as well.
    middle = math.sqrt(start * min((x for x in corners.values() if x > start), default=end))
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    turned: dict[str, Any] = {"rotation": angle, "rotation_mode": "anchor", "ha": "center"}
    names = [axes.annotate(f"copy {ceilings.copy / 1e9:,.4g} GB/s", (middle, middle * copy), (-3, 3), **turned, **note)]
    for kind, level in levels.items():
        corner = corners[kind]
        axes.plot([corner, right], [level, level], **line)
        taken += line_boxes(axes, (corner, level), (right, level))
        # No room left of a level that begins at the edge.
        place, side = ((3, 2), "left") if corner == left else ((-5, 0), "right")
        text = f"{kind} product {level:,.4g} TFLOP/s"
        names.append(axes.annotate(text, (corner, level), place, ha=side, **note))
    return [*taken, *(name.get_window_extent() for name in names)]


def _key(names: Sequence[str]) -> str:
    """The numbers' meaning, in as many columns as fit."""
    cells = [f"{place + 1:3} {name}" for place, name in enumerate(names)]
    width = max(map(len, cells)) + 2
    height = math.ceil(len(cells) / max(1, _COLUMNS // width))
    lines = ["".join(cell.ljust(width) for cell in cells[place::height]) for place in range(height)]
    return "\n".join(line.rstrip() for line in lines)


# ------------------------------------------------------------------ bandwidths


def _bandwidth(page: Page, scale: str, rows: list[Row]) -> Figure:
    """A bar for ours, with its tenth and ninetieth percentile, and markers for the others."""
    figure, (axes,) = page.figure(1.4 + 0.2 * len(rows))
    for place, row in enumerate(rows):
        for name, samples in row.results.items():
            rate, look = _rate(row, samples.median), page.looks[name]
            if name == OURS:
                spread = [[rate - _rate(row, samples.p90)], [_rate(row, samples.p10) - rate]]
                bar = {"color": _MINE_PALE, "edgecolor": _MINE, "linewidth": 0.7}
                axes.barh(place, rate, 0.64, xerr=spread, ecolor=_MINE, capsize=1.5, **bar)
                axes.plot([rate], [place], linestyle="", zorder=5, **look.marks(3.5))
            else:
                axes.plot([rate], [place], linestyle="", zorder=4, **look.marks(4.5))
    axes.set_yticks(range(len(rows)), _names(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="GB/s")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    more = []
    if page.ceilings:
        copy = page.ceilings.copy / 1e9
        more.append(axes.axvline(copy, label=f"copy, {copy:,.4g} GB/s", **_CEILING))
    axes.set_xlim(left=0)
    return page.finish(figure, f"Bandwidth, {scale}", rows, more)


# ------------------------------------------------------------------ sweeps


def _sweep(page: Page, title: str, rows: list[Row]) -> Figure:
    """Speed and time over the size, a line for each contestant with its tenth to ninetieth percentile."""
    rows = sorted(rows, key=lambda row: row.details["size"])
    sizes = [row.details["size"] for row in rows]
    figure, panels = page.figure(3.0, columns=2)
    for axes, quantity in zip(panels, (_rate, _microseconds), strict=True):
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
        for axes, quantity in zip(panels, (_rate, _microseconds), strict=True):
            best = [quantity(row, ms) for row, ms in zip(rows, floors, strict=True)]
            more = axes.plot(sizes, best, label="measured ceilings", zorder=2, **_CEILING)
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
