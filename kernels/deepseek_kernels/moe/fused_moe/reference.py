"""The experts as a sequence of operators, each differentiable and with a reference of its own.

A few tokens on a CPU, in decoding, spend more time between such operators than in them: without a gradient they are
sorted by Python, and give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.activations import gated
from ...common.half_products import MIN_ROWS
from ..grouped_gemm import grouped_gemm
from ..moe_permute import permute, sort_by_expert, unpermute

__all__ = ["few_tokens", "fused_moe", "grouped_gemm_swiglu", "takes_few"]


def fused_moe(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor, activation: str = "silu"
) -> Tensor:
    if type(x) is not Tensor and torch.onnx.is_in_onnx_export():
        return _expert_by_expert(x, gate_up, down, expert_ids, weights, activation)
    order, inverse, ends = sort_by_expert(expert_ids, gate_up.shape[0])
    hidden = grouped_gemm_swiglu(permute(x, order, inverse), gate_up, ends, activation)  # [P, I]
    return unpermute(grouped_gemm(hidden, down, ends), weights, order, inverse)


def _expert_by_expert(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Computes `fused_moe` in operators that ONNX has: no grouped product, but rows found by their values."""
    chosen, choices = expert_ids.flatten(), expert_ids.shape[1]
    out = x.new_zeros(chosen.shape[0], x.shape[1])
    for expert in range(gate_up.shape[0]):
        rows = (chosen == expert).nonzero()[:, 0]
        gate, up = F.linear(x[rows // choices], gate_up[expert]).chunk(2, dim=-1)
        out = out.index_put((rows,), F.linear(gated(activation, gate, up), down[expert]))
    wide = out.to(torch.promote_types(out.dtype, torch.float32)).view(*expert_ids.shape, x.shape[1])
    return (wide * weights[..., None]).sum(1).to(x.dtype)


def grouped_gemm_swiglu(x: Tensor, gate_up: Tensor, ends: Tensor, activation: str = "silu") -> Tensor:
    gate, up = grouped_gemm(x, gate_up, ends).chunk(2, dim=-1)  # [P, I] each
    return gated(activation, gate, up)


def takes_few(x: Tensor, expert_ids: Tensor) -> bool:
    """Returns True for few tokens on a CPU whose ids may be looked at: no tracing and no tensor subclass.

    With fewer rows for an expert than MIN_ROWS, `grouped_gemm` takes the built-in product too.
    """
    if x.device.type != "cpu" or not type(x) is type(expert_ids) is Tensor:
        return False
    # Asked before the sizes: a comparison of a symbolic size would bind the traced program to one side of it.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not (0 < x.shape[0] < MIN_ROWS and expert_ids.shape[1] > 0):
        return False
    # A mode or a function transform traces what is called, and would keep these ids as constants.
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


def few_tokens(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor, activation: str = "silu"
) -> Tensor:
    """Computes `fused_moe` without gradients and without autocast, to the same bits.

    The same rows in the same products, and their sum in the same order.

    Raises:
        ValueError: an expert id is out of range.
    """
    tokens, choices = expert_ids.shape
    chosen = expert_ids.flatten().tolist()
    pairs = tokens * choices
    order = sorted(range(pairs), key=chosen.__getitem__)  # by expert, ties in token order
    if chosen[order[0]] < 0 or chosen[order[-1]] > gate_up.shape[0]:
        raise ValueError(f"expected expert ids from 0 to {gate_up.shape[0]}, got {min(chosen)} to {max(chosen)}")
    if tokens == 1:
        rows = x.expand(choices, -1)
    else:
        rows = x.index_select(0, torch.tensor([pair // choices for pair in order], device=x.device))
    spans, start = [], 0
    for end in range(1, pairs + 1):  # of the rows of each expert; those served elsewhere come last
        expert = chosen[order[start]]
        if end == pairs or chosen[order[end]] != expert:
            spans += [(expert, slice(start, end))] if expert < gate_up.shape[0] else []
            start = end
    if not spans:
        return torch.zeros_like(x)
    gate, up = torch.cat([F.linear(rows[own], gate_up[expert]) for expert, own in spans]).chunk(2, dim=-1)
    hidden = gated(activation, gate, up)
    outputs = [F.linear(hidden[own], down[expert]) for expert, own in spans]
    if (missing := pairs - hidden.shape[0]) > 0:
        outputs.append(x.new_zeros(missing, x.shape[1]))
    inverse = sorted(range(pairs), key=order.__getitem__)
    wide = torch.cat(outputs).index_select(0, torch.tensor(inverse, device=x.device)).view(tokens, choices, -1)
    wide = wide if wide.dtype == torch.float32 else wide.to(torch.promote_types(wide.dtype, torch.float32))
    weighted = wide * weights[..., None]  # [T, K, H]
    total = weighted[:, 0]
    for choice in range(1, choices):
        total = total + weighted[:, choice]
    return total if total.dtype == x.dtype else total.to(x.dtype)
