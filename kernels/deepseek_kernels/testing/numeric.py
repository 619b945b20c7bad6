"""A comparison that says where the first difference is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_bitwise"]


def assert_bitwise(got: Tensor, expected: Tensor, *, strides: bool = True) -> None:
    """Asserts one dtype, one shape, the same bytes and, for results that are laid out on purpose, the same strides.

    Bits, not values: -0 differs from 0, and a NaN equals a NaN of the same payload only.
    """
    assert got.dtype == expected.dtype, f"expected {expected.dtype}, got {got.dtype}"
    assert got.shape == expected.shape, f"expected {list(expected.shape)}, got {list(got.shape)}"
    if strides:
        assert got.stride() == expected.stride(), f"expected strides {expected.stride()}, got {got.stride()}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = got.contiguous().view(bits) != expected.contiguous().view(bits)
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} elements differ, the first at {list(where)}: "
            f"expected {expected[where].item()!r}, got {got[where].item()!r}"
        )
