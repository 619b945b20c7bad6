"""SwiGLU in float32, then the reference of `fp8_quantize`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..fp8_quantize import quantize_rows_reference

__all__ = ["swiglu_quantize"]


def swiglu_quantize(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """See the operator, without its checks."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantize_rows_reference(F.silu(gate) * up, power_of_two)
