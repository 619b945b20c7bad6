"""The experts as a sequence of operators, each differentiable and with a reference of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...gemm.fp8_weight_gemm import fp8_weight_grouped_gemm
from ..moe_permute import permute, sort_by_expert, unpermute

__all__ = ["fp8_weight_fused_moe"]


def fp8_weight_fused_moe(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    block_size: tuple[int, int],
) -> Tensor:
    order, inverse, ends = sort_by_expert(expert_ids, gate_up.shape[0])
    rows = permute(x, order, inverse)  # [T K, H]
    gate, up = fp8_weight_grouped_gemm(rows, gate_up, gate_up_scale, ends, block_size, 2).chunk(2, dim=-1)
    out = fp8_weight_grouped_gemm(F.silu(gate) * up, down, down_scale, ends, block_size)  # [T K, H]
    return unpermute(out, weights, order, inverse)
