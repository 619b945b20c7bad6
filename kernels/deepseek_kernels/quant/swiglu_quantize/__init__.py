"""`swiglu_quantize`: SwiGLU and the FP8 quantization of its result in one reading of the input.

It stands between the two products of an expert or of a dense layer: the second takes FP8 values, so that the activation
never has to exist in 16 bits. Values, scales, floors, NaN and infinity are as in `fp8_quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from . import reference

__all__ = ["swiglu_quantize"]

dispatch.register("swiglu_quantize", "triton", capability=(8, 9))  # as fp8_quantize


def swiglu_quantize(gate_up: Tensor, scale_format: str | None = None) -> tuple[Tensor, Tensor]:
    """Computes `quantize_rows(silu(gate) * up)`, the product in float32 and not rounded before it is quantized.

    Both implementations quantize bit by bit alike; their inputs differ by the last bits of the exponentials.

    Args:
        gate_up: [M, 2 I], gate columns before up columns; float32, bfloat16 or float16. I of any size, the last group
            partial.
        scale_format: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        values [M, I] float8_e4m3fn and scales [M, ceil(I / 128)] float32, laid out as those of `quantize_rows`. Neither
        carries a gradient.

    Raises:
        ValueError: a wrong shape, dtype or scale format.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"expected gate_up [M, 2 I] in float32, bfloat16 or float16, got {gate_up.dtype} {list(gate_up.shape)}"
        )
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    power_of_two = scale_format == "ue8m0"
    if dispatch.pick("swiglu_quantize", gate_up.device) == "reference":
        return reference.swiglu_quantize(gate_up.detach(), power_of_two)
    from . import launch

    return launch.swiglu_quantize(gate_up.detach(), power_of_two)
