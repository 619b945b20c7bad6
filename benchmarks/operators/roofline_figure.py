"""The roofline of a scale: every operator that computes, by arithmetic intensity, below the measured ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.report import OURS, Row
from .figure_parts import COLUMNS, GREY, Page, names_of, rate
from .label_layout import Label, line_boxes, place_labels, plain_ticks
from .rooflines import Ceilings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = ["roofline_figure"]

_MOST_NAMES = 8  # that fit into a roofline; more are numbered, with a key below


def roofline_figure(page: Page, scale: str, rows: list[Row]) -> Figure:
    """Draws the roofline of the rows of one scale."""
    rows = sorted(rows, key=_intensity)
    names = names_of(rows)
    key = _key(names) if len(rows) > _MOST_NAMES else ""
    figure, (axes,) = page.figure(4.3 + 0.11 * key.count("\n"))
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s")
    marks = [(name, _intensity(row), rate(row, s.median)) for row in rows for name, s in row.results.items()]
    for name, x, y in marks:
        axes.plot([x], [y], linestyle="", zorder=3 + (name == OURS), **page.looks[name].marks(4.5))
    speeds, left, right = [y for *_, y in marks], _intensity(rows[0]) / 2, _intensity(rows[-1]) * 2
    if page.ceilings:
        speeds += [speed / 1e12 for speed in page.ceilings.products.values()]
        # A part of the slope is always visible: down to its left end, but not much below the lowest mark.
        left = min(left, max(page.ceilings.products.values(), default=math.inf) / page.ceilings.copy / 4)
        speeds.append(max(left * page.ceilings.copy / 1e12, min(speeds) / 2))
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set(xlim=(left, right), ylim=(min(speeds) / 1.6, max(speeds) * 1.6))
    page.finish(figure, f"Roofline, {scale}", rows, key=key)
    # From here on nothing may move: labels and angles would be wrong after another layout.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    taken = _draw_ceilings(axes, page.ceilings) if page.ceilings else []
    labels = []
    for place, row in enumerate(rows):
        best = row.results.get(OURS) or next(iter(row.results.values()))
        labels.append(Label(_intensity(row), rate(row, best.median), str(place + 1) if key else names[place]))
    place_labels(axes, labels, [(x, y) for _, x, y in marks], taken, color="#111111", fontsize=6.5)
    return figure


def _intensity(row: Row) -> float:
    return row.details["flops"] / row.details["bytes"]


def _draw_ceilings(axes: Axes, ceilings: Ceilings) -> list[Bbox]:
    """Draws the slope of a copy and the level of each product, named above the slope, where no mark can be.

    Returns:
        the pixels of lines and names.
    """
    (left, right), (low, _) = axes.get_xlim(), axes.get_ylim()
    copy = ceilings.copy / 1e12
    levels = {kind: speed / 1e12 for kind, speed in ceilings.products.items()}
    corners = {kind: min(max(level / copy, left), right) for kind, level in levels.items()}
    start, end = max(left, low / copy), max(corners.values(), default=right)
    line: dict[str, Any] = {"color": GREY, "linewidth": 1, "zorder": 1}
    axes.plot([start, end], [start * copy, end * copy], **line)
    taken = line_boxes(axes, (start, start * copy), (end, end * copy))
    (x0, y0), (x1, y1) = axes.transData.transform([(start, start * copy), (end, end * copy)])
    note: dict[str, Any] = {"color": GREY, "fontsize": 6.5, "textcoords": "offset points", "va": "bottom"}
    # Below the first corner, where the name of a product stands.
    middle = math.sqrt(start * min((x for x in corners.values() if x > start), default=end))
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    rotated: dict[str, Any] = {"rotation": angle, "rotation_mode": "anchor", "ha": "center"}
    names = [
        axes.annotate(f"copy {ceilings.copy / 1e9:,.4g} GB/s", (middle, middle * copy), (-3, 3), **rotated, **note)
    ]
    for kind, level in levels.items():
        corner = corners[kind]
        axes.plot([corner, right], [level, level], **line)
        taken += line_boxes(axes, (corner, level), (right, level))
        # A level that begins at the edge has no room at its left.
        place, side = ((3, 2), "left") if corner == left else ((-5, 0), "right")
        text = f"{kind} product {level:,.4g} TFLOP/s"
        names.append(axes.annotate(text, (corner, level), place, ha=side, **note))
    return [*taken, *(name.get_window_extent() for name in names)]


def _key(names: Sequence[str]) -> str:
    """The names of the numbered rows, in as many columns as fit."""
    cells = [f"{place + 1:3} {name}" for place, name in enumerate(names)]
    width = max(map(len, cells)) + 2
    height = math.ceil(len(cells) / max(1, COLUMNS // width))
    lines = ["".join(cell.ljust(width) for cell in cells[place::height]) for place in range(height)]
    return "\n".join(line.rstrip() for line in lines)
