"""Tiles of the rotation: static rules on shapes, which need neither Triton nor a GPU."""

from __future__ import annotations

from ...common.host import power_of_two

__all__ = ["tile_for"]

# Rotary elements of a program of 128 threads: 64 bytes of bfloat16 in flight for each thread, enough to keep the memory
# busy; 16 bytes where there would not be four programs for each of 132 multiprocessors.
_MANY, _FEW = 4096, 1024
_PROGRAMS = 4 * 132


def tile_for(tokens: int, heads: int, pairs: int) -> dict[str, int]:
    """Returns the kernel's constants: heads of one token, which share its angles, and tokens if the heads are few."""
    block = power_of_two(pairs)
    elements = _MANY if tokens * heads * 2 * pairs >= _PROGRAMS * _MANY else _FEW
    rows = max(1, elements // (2 * block))
    heads_each = min(power_of_two(heads), rows)
    return {"TOKENS": max(1, rows // heads_each), "HEADS": heads_each, "PAIR_BLOCK": block}
