"""Search for NaN and infinity in tensors while they are read or written."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NonFinite", "is_finite"]

_SHOWN = 5


def is_finite(tensor: Tensor) -> bool:
    """Returns False if a tensor holds NaN or infinity; FP8 codes 0x7F and 0xFF mean NaN.

    One pass without a mask in memory: extremes propagate NaN.
    """
    if not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return int((tensor.view(torch.uint8) & 0x7F).amax()) != 0x7F
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


class NonFinite:
    """Names of the tensors that hold NaN or infinity, in the order in which they were found."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def check(self, name: str, values: Tensor) -> None:
        """Notes `name` if some of its values are not finite."""
        if not is_finite(values):
            self._names[name] = None

    @property
    def warnings(self) -> list[str]:
        """One sentence that names the tensors; none if all values are finite."""
        if not self._names:
            return []
        names, more = list(self._names), len(self._names) - _SHOWN
        if more <= 1 - _SHOWN:
            return [f"{names[0]} has values that are not finite (NaN or infinity)"]
        shown = ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
        return [f"{len(names):,} tensors have values that are not finite (NaN or infinity): {shown}"]
