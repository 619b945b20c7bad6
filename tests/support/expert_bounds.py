"""SwiGLU experts as a loop in float64, and how far off an implementation may be.

Tolerances follow each rounding: a sum of n products in float32, in any order, errs by n * eps * sum(|terms|); what is
stored in the operands' dtype by half a unit. Fused implementations round SwiGLU's result, the rows of the second
product and the sum; the others round gate, up and silu(gate) besides. The slope of silu is at most 1.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding numbers of this size to `dtype` moves them."""
    info = torch.finfo(dtype)
    return info.eps / 2 * value.abs() + info.tiny * info.eps


def product(x: Tensor, off: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] times weight [N, K] transposed, and the error of a float32 sum where x is off by so much."""
    return x @ weight.T, (off + x.shape[-1] * EPS * (x.abs() + off)) @ weight.abs().T


def swiglu_rows(x: Tensor, gate_up: Tensor, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor]:
    """Of one expert and float64 operands: the exact result, and what an implementation may err by."""
    (gate, off_gate), (up, off_up) = (product(x, torch.zeros_like(x), half) for half in gate_up.chunk(2))
    silu = gate * gate.sigmoid()
    if not fused:
        off_gate, off_up = off_gate + rounding(gate, dtype), off_up + rounding(up, dtype)
    off = 1.1 * off_gate + (4 + gate.abs()) * EPS * silu.abs()
    if not fused:
        off = off + rounding(silu.abs() + off, dtype)
    hidden = silu * up
    off = silu.abs() * off_up + up.abs() * off + off * off_up
    return hidden, off + 3 * EPS * hidden.abs() + rounding(hidden.abs() + off, dtype)


def experts_loop(x, gate_up, down, ids, weights, dtype, fused=True) -> tuple[Tensor, Tensor]:
    """[T, H] exactly, expert by expert, and what an implementation may err by."""
    x, gate_up, down, weights = (one.detach().double().cpu() for one in (x, gate_up, down, weights))
    out, off, ids = torch.zeros_like(x), torch.zeros_like(x), ids.cpu()
    for expert in range(len(gate_up)):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if len(token):
            y, off_y = product(*swiglu_rows(x[token], gate_up[expert], dtype, fused), down[expert])
            off_y = off_y + rounding(y.abs() + off_y, dtype) + 2 * ids.shape[1] * EPS * y.abs()
            weight = weights[token, choice, None]
            out.index_add_(0, token, weight * y)
            off.index_add_(0, token, weight.abs() * off_y)
    return out, off + rounding(out.abs() + off, dtype)


def assert_within(got: Tensor, exact: Tensor, off: Tensor) -> None:
    worst = ((got.detach().double().cpu() - exact).abs() - off).max() if got.numel() else torch.tensor(0.0)
    assert worst <= 0, f"exceeds the bound by {worst:.3g}"  # also where it is NaN
