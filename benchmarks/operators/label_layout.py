"""Placement of labels beside points, without overlaps, and plain ticks of logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.transforms import Bbox

__all__ = ["Label", "line_boxes", "place_labels", "plain_ticks"]

_DISTANCES = (5, 8, 12, 17, 23, 30, 38, 47, 57, 68, 80, 95, 110, 130, 150, 175)  # points
_DIRECTIONS = 24
_LINE_FROM = 10  # points from which a line leads to the label
_GAP = 0.7  # around a label, in points
_MARK = 3.5  # half the size of a marker, in points
_STEP = 3.0  # points between the boxes that stand for a line


@dataclass(frozen=True)
class Label:
    """Text beside the point (x, y) of the data."""

    x: float
    y: float
    text: str


def place_labels(
    axes: Axes, labels: Sequence[Label], marks: Sequence[tuple[float, float]], taken: Sequence[Bbox] = (), **style: Any
) -> None:
    """Writes the labels within the axes, each at the nearest place without a marker or another label.

    The figure's layout must be fixed, since a new layout moves the points.

    Args:
        marks: points of the data where a marker is.
        taken: pixels with something else.
        style: of the text.
    """
    unit = _unit(axes)
    inside = axes.get_window_extent()
    busy = [*taken, *(_around(x, y, _MARK * unit) for x, y in axes.transData.transform(marks))]
    written: list[Bbox] = []  # labels and the lines to them
    for label in labels:
        text = axes.annotate(label.text, (label.x, label.y), ha="center", va="center", zorder=6, **style)
        shape = text.get_window_extent().padded(_GAP * unit)
        text.remove()
        x, y = axes.transData.transform((label.x, label.y))
        box, leader = _free(x, y, shape, unit, inside, busy, written)
        written += [box, *leader]
        offset = ((box.x0 + box.x1) / 2 - x) / unit, ((box.y0 + box.y1) / 2 - y) / unit
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2.5}
        axes.annotate(
            label.text,
            (label.x, label.y),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            zorder=6,
            arrowprops=line if leader else None,
            **style,
        )


def line_boxes(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> list[Bbox]:
    """Returns small boxes along a line between two points of the data, in pixels."""
    (x0, y0), (x1, y1) = axes.transData.transform([start, end])
    return _along(x0, y0, x1, y1, _unit(axes))


def _unit(axes: Axes) -> float:
    """Pixels of a point."""
    return axes.get_figure().dpi / 72


def _along(x0: float, y0: float, x1: float, y1: float, unit: float) -> list[Bbox]:
    count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / (_STEP * unit)))
    return [_around(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count, 0.5 * unit) for i in range(count + 1)]


def _around(x: float, y: float, half: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _free(
    x: float, y: float, shape: Bbox, unit: float, inside: Bbox, busy: Sequence[Bbox], written: Sequence[Bbox]
) -> tuple[Bbox, Sequence[Bbox]]:
    """The nearest free box of this shape, and the boxes of the line to it.

    The line may cross `busy` boxes, and `written` ones only if there is no other way. The nearest box if none is free.
    """
    crossing: tuple[Bbox, Sequence[Bbox]] | None = None
    places = list(_places(x, y, shape, unit))
    for distance, box in places:
        within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if not within or any(box.overlaps(other) for other in (*busy, *written)):
            continue
        if distance <= _LINE_FROM:
            return box, ()
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        leader = [one for one in _along(x, y, *middle, unit) if not one.overlaps(box)]
        if not any(one.overlaps(other) for one in leader for other in written):
            return box, leader
        crossing = crossing or (box, leader)
    return crossing or (places[0][1], ())


def _places(x: float, y: float, shape: Bbox, unit: float) -> Iterator[tuple[float, Bbox]]:
    """Boxes at growing distances from the point, in all directions, right and above first."""
    from matplotlib.transforms import Bbox

    for distance in _DISTANCES:
        for step in range(_DIRECTIONS):
            turn = (1 if step % 2 else -1) * ((step + 1) // 2)
            angle = math.pi / 8 + 2 * math.pi * turn / _DIRECTIONS
            # Along a direction, half the box lies between its centre and the edge that faces the point.
            right = x + math.cos(angle) * (distance * unit + shape.width / 2)
            up = y + math.sin(angle) * (distance * unit + shape.height / 2)
            yield distance, Bbox.from_bounds(right - shape.width / 2, up - shape.height / 2, shape.width, shape.height)


def plain_ticks(axis: Axis) -> None:
    """Writes plain numbers on a logarithmic axis, also between the powers of ten if there are few."""

    def major(value: float, _: object) -> str:
        return f"{value:,g}"

    def minor(value: float, _: object) -> str:
        low, high = axis.get_view_interval()
        shown = (2, 3, 4, 6, 8) if high < 10 * low else (2, 5) if high < 100 * low else ()
        return f"{value:,g}" if round(value / 10 ** math.floor(math.log10(value))) in shown else ""

    axis.set_major_formatter(major)
    axis.set_minor_formatter(minor)
