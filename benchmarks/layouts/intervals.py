"""Sets of time intervals: their union, what one has beyond another, and their length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Interval", "beyond", "clipped", "joined", "length"]

Interval = tuple[float, float]
"""Start and end."""


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the union as disjoint intervals in order; those that touch become one, empty ones vanish."""
    out: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def beyond(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """Returns the part of the union of `intervals` that none of `others` covers."""
    out: list[Interval] = []
    covers = joined(others)
    first = 0
    for start, end in joined(intervals):
        while first < len(covers) and covers[first][1] <= start:
            first += 1
        for cover_start, cover_end in covers[first:]:
            if cover_start >= end:
                break
            if cover_start > start:
                out.append((start, cover_start))
            start = max(start, cover_end)
        if start < end:
            out.append((start, end))
    return out


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Returns the parts within `window`."""
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    return [(start, end) for start, end in cut if end > start]


def length(intervals: Sequence[Interval]) -> float:
    """Returns the sum of the lengths of disjoint intervals."""
    return sum(end - start for start, end in intervals)
