"""Tiles of the Hadamard rotation: static rules on shapes, which need neither Triton nor a GPU. Nothing was measured."""

from __future__ import annotations

from typing import Any

from ...common.host import ENOUGH_PROGRAMS, cdiv

__all__ = ["MOST_WIDTH", "options_for", "rows_for"]

MOST_WIDTH = 1024  # a row stays in the registers of a program
_VALUES = 4096  # of a program where there are many rows


def rows_for(rows: int, width: int) -> int:
    """Returns the rows of a program: 32 values a thread where there are many, else one row for each program."""
    many = max(1, _VALUES // width)
    return many if cdiv(rows, many) >= ENOUGH_PROGRAMS else 1


def options_for(rows: int, width: int) -> dict[str, Any]:
    """Returns the arguments of a launch of programs of so many rows."""
    constants = {"ROWS": rows, "D": width, "FACTOR": width**-0.5, "PASSES": width.bit_length() - 1}
    return {**constants, "num_warps": max(1, min(4, rows * width // 1024))}
