"""Goals of operators, in the unit in which a table states them: "48 us", "850 TF", "3.2 TB/s"."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Goal"]

# Unit: how many of it one second, one FLOP/s or one byte/s is.
_TIMES = {"us": 1e6, "ms": 1e3, "s": 1.0}
_RATES = {"TF": 1e-12, "GB/s": 1e-9, "TB/s": 1e-12}


@dataclass(frozen=True)
class Goal:
    """Goals of an operator at one shape, such as "48 us" or "850 TF".

    Attributes:
        must: the goal.
        stretch: a further one, or "".

    Raises:
        ValueError: `must` or `stretch` is no number with a unit.
    """

    must: str
    stretch: str = ""

    def __post_init__(self) -> None:
        for text in filter(None, (self.must, self.stretch)):
            _parse(text)

    def describe(self) -> str:
        return self.must + (f", stretch {self.stretch}" if self.stretch else "")

    def reached(self, seconds: float, flops: float, moved: float) -> str:
        """Returns "stretch", "must" or "" for a run of `seconds` that computes `flops` and moves `moved` bytes."""
        for name in ("stretch", "must"):
            text = getattr(self, name)
            if text and _achieved(text, seconds, flops, moved) >= 1:
                return name
        return ""


def _parse(text: str) -> tuple[float, str]:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?) (\S+)", text)
    if not parts or parts[2] not in _TIMES | _RATES or float(parts[1]) == 0:
        raise ValueError(f"expected a goal such as '48 us', '850 TF' or '3.2 TB/s', got {text!r}")
    return float(parts[1]), parts[2]


def _achieved(text: str, seconds: float, flops: float, moved: float) -> float:
    """Returns the achieved speed as a multiple of the goal `text`."""
    value, unit = _parse(text)
    if unit in _TIMES:
        return value / (seconds * _TIMES[unit])
    return (flops if unit == "TF" else moved) / seconds * _RATES[unit] / value
