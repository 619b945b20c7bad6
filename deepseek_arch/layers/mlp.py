"""The SwiGLU feed-forward block (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear

__all__ = ["MLP", "swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`: a dense layer's, or the shared experts of a MoE layer."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = Linear(hidden_size, intermediate_size, **factory)
        self.up_proj = Linear(hidden_size, intermediate_size, **factory)
        self.down_proj = Linear(intermediate_size, hidden_size, **factory)

    def norm_consumers(self) -> tuple[nn.Module, ...]:
        """Returns the linear layers that alone read the input, and so a norm before it."""
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
