"""Search for NaN, infinity and odd scales in tensors while they are read or written."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.parameter_map import scale_name

__all__ = ["NonFinite", "is_finite"]

_SHOWN = 5
_SCALE = scale_name("")


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
    """Names of the tensors that hold NaN or infinity, or scales of 0 or less, in the order in which they were found."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def check(self, name: str, values: Tensor) -> None:
        """Notes `name` if some of its values are not finite or, where they are scales, not above 0."""
        if not is_finite(values):
            self._note("values that are not finite (NaN or infinity)", name)
        if name.endswith(_SCALE) and values.is_floating_point() and values.dtype.itemsize > 1 and values.numel():
            least = float(values.amin())
            if least == 0:
                self._note("scales of 0, which make zeros of the values in their blocks", name)
            elif least < 0:
                self._note("scales below 0, which load refuses", name)

    def _note(self, what: str, name: str) -> None:
        self._names.setdefault(what, {})[name] = None

    @property
    def warnings(self) -> list[str]:
        """One sentence for each kind that names the tensors; none if all values are as they should be."""
        return [_sentence(list(names), what) for what, names in self._names.items()]


def _sentence(names: list[str], what: str) -> str:
    if len(names) == 1:
        return f"{names[0]} has {what}"
    more = len(names) - _SHOWN
    return f"{len(names):,} tensors have {what}: {', '.join(names[:_SHOWN])}" + (
        f" and {more:,} more" if more > 0 else ""
    )
