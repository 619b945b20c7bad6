"""A clock for tests, which a test sets."""

from __future__ import annotations

__all__ = ["Clock"]


class Clock:
    """Seconds that pass only when a test adds them to `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
