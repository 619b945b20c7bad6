"""`rope` and `rope_`: the rotation of interleaved pairs by position, into a new tensor or in place.

DeepSeek's weights hold each rotary pair side by side, and last in a head: [x_0 .. | p_0 q_0 p_1 q_1 ..] (TRAPS A1, A4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from . import reference
from .reference import rope as rope_reference

__all__ = ["rope", "rope_", "rope_reference"]

dispatch.register("rope", "triton")
_NARROW = (torch.bfloat16, torch.float16, torch.float32)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the last R columns of each row and copies the columns before them.

    A pair (p, q) becomes (p cos - q sin, p sin + q cos), each product and sum rounded in the dtype of `cos`, the result
    rounded once to that of `x`. Both implementations give the same bits.

    Args:
        x: [B, T, N, D] or [B, T, D], floating point; the Triton kernels need bfloat16, float16 or float32. Any strides,
            best with neighbouring columns.
        cos, sin: [B or 1, T, R / 2] with 0 < R <= D, float32 (or float64, on the reference), the same for all N heads.
            No gradient.

    Returns:
        a contiguous tensor like x, differentiable with respect to it.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    _check(x, cos, sin)
    if _implementation(x, cos) == "reference":
        return reference.rope(x, cos.detach(), sin.detach())
    from . import launch

    return launch.rope(x, cos, sin)


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates as `rope`, into `x` itself, which is returned; no other column of its memory is touched.

    Args:
        x, cos, sin: as those of `rope`. x may be a view; its elements must not share memory with each other.

    Raises:
        ValueError: the shapes or dtypes do not fit, or a gradient would have to pass.
    """
    _check(x, cos, sin)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("expected x without gradient, or torch.no_grad(): rope_ is not differentiable, rope is")
    if _implementation(x, cos) == "reference":
        return reference.rope_(x, cos, sin)
    from . import launch

    launch.rope_(x, cos, sin)
    return x


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim not in (3, 4) or not x.dtype.is_floating_point:
        raise ValueError(f"expected floating-point x [B, T, N, D] or [B, T, D], got {x.dtype} {list(x.shape)}")
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected cos and sin alike, in float32 or float64, "
            f"got {cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}"
        )
    batch, length, width = x.shape[0], x.shape[1], x.shape[-1]
    fits = cos.ndim == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == length and 0 < 2 * cos.shape[2] <= width
    if not fits:
        raise ValueError(
            f"expected cos and sin [{batch} or 1, {length}, R / 2] with 0 < R <= {width}, got {list(cos.shape)}"
        )


def _implementation(x: Tensor, cos: Tensor) -> str:
    unsupported = None
    if x.dtype not in _NARROW:
        unsupported = f"its x is bfloat16, float16 or float32, got {x.dtype}"
    elif cos.dtype != torch.float32:
        unsupported = f"its cos and sin are float32, got {cos.dtype}"
    return dispatch.pick("rope", x.device, unsupported)
