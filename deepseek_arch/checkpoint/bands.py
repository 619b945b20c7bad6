"""Ranges of rows that are read, converted or sent at a time."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["bands"]

_BAND_BYTES = 16 * 2**20


def bands(first: int, end: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts rows into ranges of about 16 MiB that begin at multiples of `multiple`, the first at one before `first`."""
    step = max(1, _BAND_BYTES // max(1, row_bytes) // multiple) * multiple
    for start in range(first // multiple * multiple, end, step):
        yield start, min(start + step, end)
