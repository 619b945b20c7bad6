"""Root-mean-square normalization (arXiv 1910.07467), as the published checkpoints mean it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_kernels.norm.rms_norm import add_rms_norm, rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """`weight * (x / sqrt(mean(x²) + eps))`: statistics in float32, rounded to `x.dtype` before the weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., hidden_size] -> the same; with a residual like x, the norm of their sum, and the sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
