"""Checks of a result before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Mismatch", "require_close", "require_equal"]


class Mismatch(ValueError):
    """A wrong result, which is therefore not timed."""


def require_equal(got: Tensor, expected: Tensor, what: str = "result") -> None:
    """Raises `Mismatch` unless both have the same shape, dtype and bits."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Mismatch(f"expected {what} {expected.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    different = int((got.contiguous().view(bits) != expected.contiguous().view(bits)).sum())
    if different:
        raise Mismatch(f"expected {what} bit by bit, got {different} of {got.numel()} elements that differ")


def require_close(got: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    """Raises `Mismatch` unless |got - expected| <= tolerance * |expected| in Euclidean norms; NaN is never close."""
    if got.shape != expected.shape:
        raise Mismatch(f"expected {what} {list(expected.shape)}, got {list(got.shape)}")
    # In bands of rows: float32 copies of both would not fit into memory beside the operands.
    error = norm = 0.0
    for mine, theirs in zip(_bands(got.detach()), _bands(expected.detach()), strict=True):
        wide = theirs.float()
        error += float((mine.float() - wide).square().sum(dtype=torch.float64))
        norm += float(wide.square().sum(dtype=torch.float64))
    relative = (error / norm) ** 0.5 if norm else error**0.5
    if not relative <= tolerance:
        raise Mismatch(f"expected {what} within {tolerance:.2g} (relative), got {relative:.3g}")


def _bands(x: Tensor) -> Sequence[Tensor]:
    return x.reshape(-1, x.shape[-1] if x.ndim else 1).split(4096)
