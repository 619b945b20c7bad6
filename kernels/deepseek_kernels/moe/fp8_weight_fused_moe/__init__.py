"""`fp8_weight_fused_moe`: the routed experts with weights that stay FP8 and activations of high precision.

Notation as for `fused_moe`: T tokens, K choices of each, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from torch import Tensor

from ... import dispatch
from ...gemm.fp8_weight_gemm import check_operands
from ..fused_moe import cpu
from . import reference

__all__ = ["fp8_weight_fused_moe"]

dispatch.register("fp8_weight_fused_moe", "cpu")


def fp8_weight_fused_moe(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """The weighted sum of each token's SwiGLU experts, without ever holding a dequantized weight.

    The reference is the sequence of `sort_by_expert`, `permute`, two `fp8_weight_grouped_gemm` with SwiGLU between them
    and `unpermute`, and differentiable as these are. The C++ operator takes few tokens without gradients, reads the
    codes of each chosen expert once, and rounds where `fused_moe` does.

    Args:
        x: [T, H] float32, bfloat16 or float16.
        gate_up: [E, 2 I, H] float8_e4m3fn, each expert's gate rows above its up rows.
        gate_up_scale: [E, 2 ceil(I / block_rows), ceil(H / block_columns)] float32, a grid each for gate and up.
        down: [E, H, I] float8_e4m3fn.
        down_scale: [E, ceil(H / block_rows), ceil(I / block_columns)] float32.
        expert_ids: [T, K] int64; the value E marks a choice that is served elsewhere and adds nothing here.
        weights: [T, K] float32 routing weights, finite.

    Returns:
        [T, H] in `x.dtype`, under autocast in its dtype.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    _check(x, gate_up, gate_up_scale, down, down_scale, expert_ids, weights, block_size)
    (x,) = dispatch.autocast(x)
    chosen = dispatch.pick("fp8_weight_fused_moe", x.device)
    if chosen == "cpu" and cpu.takes(x, gate_up, down, weights):
        scales = gate_up_scale, down_scale
        return cpu.fused_moe(x, gate_up, down, expert_ids, weights, *scales, *block_size)
    return reference.fp8_weight_fused_moe(x, gate_up, gate_up_scale, down, down_scale, expert_ids, weights, block_size)


def _check(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    block_size: tuple[int, int],
) -> None:
    if x.ndim != 2 or gate_up.ndim != 3:
        raise ValueError(f"expected x [T, H] and gate_up [E, 2 I, H], got {list(x.shape)} and {list(gate_up.shape)}")
    check_operands(x, gate_up, gate_up_scale, block_size, 2)
    experts, double, hidden = gate_up.shape
    if down.shape != (experts, hidden, double // 2):
        raise ValueError(f"expected down {[experts, hidden, double // 2]}, got {list(down.shape)}")
    check_operands(x.new_empty(0, double // 2), down, down_scale, block_size, 1)
    if expert_ids.ndim != 2 or expert_ids.shape[0] != x.shape[0]:
        raise ValueError(f"expected expert_ids [{x.shape[0]}, K], got {list(expert_ids.shape)}")
    if weights.shape != expert_ids.shape:
        raise ValueError(f"expected weights {list(expert_ids.shape)}, got {list(weights.shape)}")
