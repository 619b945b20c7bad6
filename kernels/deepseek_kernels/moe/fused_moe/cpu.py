"""The experts in one C++ call: each chosen expert's weights are read once, no other's at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.cpu import multiplies_many, needs_gradient

__all__ = ["fused_moe", "takes"]

MOST_TOKENS = 32  # without products of many rows: with more, experts own enough for those to be faster elsewhere


def takes(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> bool:
    """Returns True if the C++ operator is made for these operands; all others are the reference's."""
    (narrow,) = dispatch.autocast(x[:0])
    return (
        narrow.dtype in (torch.bfloat16, torch.float32)
        and weights.dtype == torch.float32
        and len(x) > 0
        and (len(x) <= MOST_TOKENS or multiplies_many(narrow.dtype, gate_up.dtype))
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and gate_up.numel() > 0
        and not needs_gradient(x, gate_up, down, weights)
    )


def fused_moe(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor, *scales) -> Tensor:
    """See `fused_moe`; with `scales`, block rows and block columns, `fp8_weight_fused_moe`."""
    return torch.ops.deepseek_kernels_cpu.experts(x, gate_up, down, expert_ids, weights, *scales)
