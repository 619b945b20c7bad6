"""`fused_moe`: the routed experts in one operator; `grouped_gemm_swiglu`: their first product with SwiGLU behind it.

Notation: T tokens, K choices of each, P = T * K rows sorted by expert, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.activations import ACTIVATIONS, SILU
from . import cpu, reference

__all__ = ["fused_moe", "grouped_gemm_swiglu"]

dispatch.register("fused_moe", "triton", "cpu")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_moe(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor, activation: str = "silu"
) -> Tensor:
    """Returns the weighted sum of each token's experts, each `down(activation(gate(x)) * up(x))`.

    Where a gradient is needed this is `sort_by_expert`, `permute`, `grouped_gemm`, SwiGLU, `grouped_gemm` and
    `unpermute`, each of which picks its own implementation. Without gradients the kernels make no sorted copy of the
    tokens, read no expert that no token chose, and keep gate and up in float32 until SwiGLU's result is rounded: three
    roundings fewer than the sequence has. The result of every row of the second product is rounded to `x.dtype`, and
    the weighted sum over choices is taken in float32, in their order, and rounded once (TRAPS C9, C14), as there.

    Args:
        x: [T, H].
        gate_up: [E, 2 I, H], each expert's gate rows above its up rows.
        down: [E, H, I].
        expert_ids: [T, K] int64; the value E marks a choice that is served elsewhere and adds nothing here.
        weights: [T, K] float32 routing weights, finite.
        activation: a name of `common.activations`; the kernels have SiLU only, and leave others to the sequence.

    Returns:
        [T, H] in `x.dtype`, under autocast in its dtype.

    Raises:
        ValueError: the shapes or the dtypes do not fit, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation out of {', '.join(ACTIVATIONS)}, got {activation!r}")
    dtype = _check_matrices(x, gate_up, down)
    if expert_ids.ndim != 2 or expert_ids.shape[0] != x.shape[0] or expert_ids.dtype != torch.int64:
        raise ValueError(
            f"expected int64 expert_ids [{x.shape[0]}, K], got {expert_ids.dtype} {list(expert_ids.shape)}"
        )
    if weights.shape != expert_ids.shape:
        raise ValueError(f"expected weights {list(expert_ids.shape)}, got {list(weights.shape)}")
    obstacle = _obstacle(dtype, weights.dtype)
    if activation not in SILU:
        obstacle = f"its activation is silu, got {activation}"
    if _needs_gradient(x, gate_up, down, weights):
        return reference.fused_moe(x, gate_up, down, expert_ids, weights, activation)
    chosen = dispatch.pick("fused_moe", x.device, obstacle)
    if chosen == "cpu" and activation in SILU and cpu.takes(x, gate_up, down, weights):
        return cpu.fused_moe(*dispatch.autocast(x, gate_up, down), expert_ids, weights)
    if chosen != "triton":
        if dtype == x.dtype and reference.takes_few(x, expert_ids):
            return reference.few_tokens(x, gate_up, down, expert_ids, weights, activation)
        return reference.fused_moe(x, gate_up, down, expert_ids, weights, activation)
    from . import launch

    return launch.fused_moe(*dispatch.autocast(x, gate_up, down), expert_ids, weights)


def grouped_gemm_swiglu(x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, row block e of x with expert e's matrices.

    The kernels round once, the reference rounds gate and up, silu(gate) and the result.

    Args:
        x: [P, H], rows sorted by expert.
        gate_up: [E, 2 I, H], each expert's gate rows above its up rows.
        ends: [E] int64, as for `grouped_gemm`.

    Returns:
        [P, I] in `x.dtype`, under autocast in its dtype; zeros in unassigned rows. The kernels have no
        gradient: where one is needed the reference runs, the differentiable `grouped_gemm` and SwiGLU.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    dtype = _check_matrices(x, gate_up)
    if ends.shape != gate_up.shape[:1]:
        raise ValueError(f"expected ends {list(gate_up.shape[:1])}, got {list(ends.shape)}")
    needs_gradient = _needs_gradient(x, gate_up)
    obstacle = "its fused SwiGLU has no gradient" if needs_gradient else _obstacle(dtype)
    if dispatch.pick("fused_moe", x.device, obstacle) != "triton":
        return reference.grouped_gemm_swiglu(x, gate_up, ends)
    from . import launch

    return launch.grouped_gemm_swiglu(*dispatch.autocast(x, gate_up), ends)


def _check_matrices(x: Tensor, gate_up: Tensor, *down: Tensor) -> torch.dtype:
    """The dtype that all of them have, or get by autocast."""
    if x.ndim != 2 or gate_up.ndim != 3 or gate_up.shape[1] % 2:
        raise ValueError(f"expected x [T, H] and gate_up [E, 2 I, H], got {list(x.shape)} and {list(gate_up.shape)}")
    experts, double, hidden = gate_up.shape
    if x.shape[1] != hidden:
        raise ValueError(f"expected x [T, {hidden}] beside gate_up {list(gate_up.shape)}, got {list(x.shape)}")
    for matrix in down:
        if matrix.shape != (experts, hidden, double // 2):
            raise ValueError(f"expected down {[experts, hidden, double // 2]}, got {list(matrix.shape)}")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # Of no rows: the weights are not cast to learn their dtypes.
        x, gate_up, *cast = dispatch.autocast(*(one[:0] for one in (x, gate_up, *down)))
        down = tuple(cast)
    for matrix in (gate_up, *down):
        if matrix.dtype != x.dtype:
            dtypes = ", ".join(str(one.dtype) for one in (x, gate_up, *down))
            raise ValueError(f"expected x and the weights of one dtype, got {dtypes}")
    return x.dtype


def _needs_gradient(*tensors: Tensor) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def _obstacle(*dtypes: torch.dtype) -> str | None:
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"its operands are bfloat16, float16 or float32, got {dtype}"
    return None
