"""The experts as a sequence of operators, each differentiable and with a reference of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..grouped_gemm import grouped_gemm
from ..moe_permute import permute, sort_by_expert, unpermute

__all__ = ["fused_moe", "grouped_gemm_swiglu"]


def fused_moe(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    order, inverse, ends = sort_by_expert(expert_ids, gate_up.shape[0])
    hidden = grouped_gemm_swiglu(permute(x, order, inverse), gate_up, ends)  # [P, I]
    return unpermute(grouped_gemm(hidden, down, ends), weights, order, inverse)


def grouped_gemm_swiglu(x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
    gate, up = grouped_gemm(x, gate_up, ends).chunk(2, dim=-1)  # [P, I] each
    return F.silu(gate) * up
