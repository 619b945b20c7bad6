"""`rms_norm`: root-mean-square normalization (arXiv 1910.07467), with a residual sum before it, and with FP8 after it.

One rule for all of them, that of the published checkpoints: `weight * (x / sqrt(mean(x^2) + eps))`, statistics in
float32, rounded to x's dtype *before* the weight, the product in torch's promotion of both dtypes (TRAPS B2). Where a
residual is added, the sum is rounded once, and the rounded sum is normed, as code that is not fused does it.

The kernels read everything once. Both implementations differ only in the order of a row's sum and in the last bit of
its reciprocal root; within one of them, a row's result does not depend on the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common import cpu
from . import reference
from .reference import rms_norm as rms_norm_reference

__all__ = ["add_rms_norm", "add_rms_norm_quantize", "rms_norm", "rms_norm_quantize", "rms_norm_reference"]

dispatch.register("rms_norm", "triton", "cpu")
dispatch.register("rms_norm_quantize", "triton", capability=(8, 9))  # as fp8_quantize

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_COLUMNS = 16384  # a row is held in the registers of one block


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes `weight * (x / sqrt(mean(x^2) + eps))` over the last dimension.

    Args:
        x: [..., H], of any strides.
        weight: [H].

    Returns:
        [..., H] in torch's promotion of both dtypes. Differentiable in both; the kernels' derivative is not.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    chosen = dispatch.pick("rms_norm", x.device, _check(x, None, weight))
    if chosen == "cpu" and _cpu_takes(x, weight):
        return torch.ops.deepseek_kernels_cpu.rms_norm(x, None, weight, eps)[0]
    if chosen != "triton":
        return reference.rms_norm(x, weight, eps)
    from . import launch

    return launch.rms_norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norms the residual stream after a block, `total = x + residual`.

    Args:
        x: [..., H], the block's result.
        residual: [..., H], the stream before it.
        weight: [H].

    Returns:
        `rms_norm(total)`, and total [..., H] in torch's promotion of the dtypes of x and residual, rounded
        once. Differentiable in all three; the kernels' derivative is not.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    chosen = dispatch.pick("rms_norm", x.device, _check(x, residual, weight))
    if chosen == "cpu" and _cpu_takes(x, residual, weight):
        return torch.ops.deepseek_kernels_cpu.rms_norm(x, residual, weight, eps)
    if chosen != "triton":
        return reference.add_rms_norm(x, residual, weight, eps)
    from . import launch

    return launch.rms_norm(x, residual, weight, eps)[:2]


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Computes `quantize_rows(rms_norm(x))`, bit by bit, without writing the norm.

    Args:
        x: [..., H], float32, bfloat16 or float16; M rows in all.
        weight: [H], of such a dtype too.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        values [M, H] float8_e4m3fn and scales [M, ceil(H / 128)] float32, laid out as those of `quantize_rows`, and
        without a gradient as those.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    power_of_two = _check_quantized(x, None, weight, scale_format)
    x, weight = x.detach(), weight.detach()
    if dispatch.pick("rms_norm_quantize", x.device, _check(x, None, weight)) == "reference":
        return reference.rms_norm_quantize(x, weight, eps, power_of_two)
    from . import launch

    return launch.quantize(x, None, weight, eps, power_of_two)[:2]


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale_format: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `quantize_rows` of `add_rms_norm`'s norm, bit by bit, and the sum.

    Args:
        x, residual: [..., H], float32, bfloat16 or float16; M rows in all.
        weight: [H], of such a dtype too.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        values and scales as those of `rms_norm_quantize`, and total [..., H] as that of `add_rms_norm`.

    Raises:
        ValueError: a wrong shape, dtype or scale format; or x or residual require a gradient: there is none through
            FP8 values, and through the sum alone it would be wrong.
    """
    power_of_two = _check_quantized(x, residual, weight, scale_format)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        raise ValueError(
            "expected no gradient through codes, got x or residual that require one: "
            "use torch.no_grad() or add_rms_norm"
        )
    weight = weight.detach()
    if dispatch.pick("rms_norm_quantize", x.device, _check(x, residual, weight)) == "reference":
        return reference.add_rms_norm_quantize(x, residual, weight, eps, power_of_two)
    from . import launch

    return launch.quantize(x, residual, weight, eps, power_of_two)


def _cpu_takes(*operands: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    for operand in operands:
        if operand.dtype not in _DTYPES:
            return False
    return not cpu.needs_gradient(*operands)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> str | None:
    """Checks the operands, and returns the reason why the kernels cannot take them, or None."""
    if not x.ndim or weight.shape != x.shape[-1:]:
        raise ValueError(f"expected x [..., H] and weight [H], got {list(x.shape)} and {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"expected a residual {list(x.shape)}, as x, got {list(residual.shape)}")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"expected {name} in a floating dtype, got {tensor.dtype}")
    for tensor in (x, residual, weight):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"its operands are bfloat16, float16 or float32, got {tensor.dtype}"
    if x.shape[-1] > _MOST_COLUMNS:
        return f"its rows have {_MOST_COLUMNS} features at most, got {x.shape[-1]}"
    return None


def _check_quantized(x: Tensor, residual: Tensor | None, weight: Tensor, scale_format: str | None) -> bool:
    """Returns True if scales are to be powers of two."""
    _check(x, residual, weight)
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"expected {name} in float32, bfloat16 or float16, got {tensor.dtype}")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    return scale_format == "ue8m0"
