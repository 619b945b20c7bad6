"""Linear layers whose product is one of our operators."""

from __future__ import annotations

from torch import Tensor, nn

from deepseek_kernels import dense_gemm

__all__ = ["Linear"]


class Linear(nn.Linear):
    """`nn.Linear` on `deepseek_kernels.dense_gemm`: the same parameters and result, fast on any CPU.

    A subclass, so that everything that looks for `nn.Linear` (LoRA, quantizers, hooks) finds it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out = dense_gemm(x, self.weight)
        return out if self.bias is None else out + self.bias
