"""`hadamard`, `hadamard_quantize`: the rotation by a Hadamard matrix in front of FP8 quantization.

The rotation spreads outliers over all features of a row, so that a scale for the row fits all of them. It is
orthogonal: products of rotated rows are those of the rows themselves, exactly in exact arithmetic and not bit by bit in
FP8 (TRAPS G2). DeepSeek-V3.2's indexer rotates its queries and keys before it quantizes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.fp8 import HIGH_PRECISION
from . import reference
from .configs import MOST_WIDTH

__all__ = ["hadamard", "hadamard_quantize"]

# 8.9: the first with conversions between float32 and e4m3.
dispatch.register("hadamard_quantize", "triton", capability=(8, 9))


def hadamard(x: Tensor) -> Tensor:
    """Multiplies each row by the Hadamard matrix of Sylvester's construction, divided by the square root of D.

    Args:
        x: [..., D] in a floating dtype, D a power of two.

    Returns:
        like x; sums are in float32 (float64 for float64), rounded once, the same bits from the kernel and the
        reference. Differentiable; its own inverse.

    Raises:
        ValueError: D is no power of two, or x has no floating dtype.
    """
    _check(x)
    if dispatch.pick("hadamard_quantize", x.device, _unsupported(x)) != "triton":
        return reference.hadamard(x)
    from . import launch

    return launch.hadamard(x)


def hadamard_quantize(x: Tensor, scale_format: str | None = "ue8m0") -> tuple[Tensor, Tensor]:
    """Rotates rows as `hadamard`, rounded to x's dtype, and quantizes them as `quantize_rows`.

    Args:
        x: [M, D], float32, bfloat16 or float16; D a power of two.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        values [M, D] float8_e4m3fn and scales [M, ceil(D / 128)] float32, laid out as those of `quantize_rows`,
        without a gradient.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    _check(x)
    if x.ndim != 2 or x.dtype not in HIGH_PRECISION:
        raise ValueError(f"expected a float32, bfloat16 or float16 matrix, got {x.dtype} {list(x.shape)}")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    if dispatch.pick("hadamard_quantize", x.device, _unsupported(x)) != "triton":
        return reference.hadamard_quantize(x.detach(), scale_format == "ue8m0")
    from . import launch

    return launch.hadamard_quantize(x.detach(), scale_format == "ue8m0")


def _check(x: Tensor) -> None:
    width = x.shape[-1] if x.ndim else 0
    if width < 1 or width & (width - 1) or not x.dtype.is_floating_point or x.dtype == torch.float8_e4m3fn:
        raise ValueError(f"expected floating-point rows of a power of two of values, got {x.dtype} {list(x.shape)}")


def _unsupported(x: Tensor) -> str | None:
    """Returns the reason why the kernels cannot take these rows, or None."""
    if x.dtype not in HIGH_PRECISION:
        return f"its rows are float32, bfloat16 or float16, got {x.dtype}"
    if x.shape[-1] > MOST_WIDTH:
        return f"its rows have at most {MOST_WIDTH} values, got {x.shape[-1]}"
    return None
