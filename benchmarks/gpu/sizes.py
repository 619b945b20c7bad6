"""Sizes of the GPU checks: full ones, and small ones that test the checks themselves on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "SMALL", "Sizes", "Skipped"]


class Skipped(Exception):
    """Raised by a check that needs more memory than the device has."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the operands of every check.

    Attributes:
        scale: the first shape of each operator at this scale is repeated.
        products: M, N, K of the exact products.
        rows, width: of a matrix with more elements than int32 can index.
        experts, expert: of weights [experts, expert, width], likewise.
        tokens, topk: of rows [tokens * topk, width], likewise.
        long: terms of the longest sum.
    """

    scale: str
    products: tuple[tuple[int, int, int], ...]
    rows: int
    width: int
    experts: int
    expert: int
    tokens: int
    topk: int
    long: int


FULL = Sizes(
    scale="v3",
    # Whole tiles, a decode, one token on a partial block, and sizes that no tile divides.
    products=((4096, 7168, 2048), (64, 7168, 16384), (1, 576, 7168), (300, 200, 1008)),
    rows=300_032,
    width=7168,
    experts=80,
    expert=4096,
    tokens=40_000,
    topk=8,
    long=16384,
)
SMALL = Sizes("tiny", ((20, 24, 200), (1, 130, 128)), 256, 192, 3, 160, 12, 2, 512)
