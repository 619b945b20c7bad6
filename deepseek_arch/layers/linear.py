"""Linear layers whose product is one of our operators, and the embedding."""

from __future__ import annotations

from torch import Tensor, nn

from deepseek_kernels import dense_gemm

__all__ = ["Embedding", "Linear"]


class Linear(nn.Linear):
    """`nn.Linear` on `deepseek_kernels.dense_gemm`: the same parameters and result, fast on any CPU.

    A subclass, so that everything that looks for `nn.Linear` (LoRA, quantizers, hooks) finds it.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where a draw would only make PyTorch import its compiler, for seconds
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out = dense_gemm(x, self.weight)
        return out if self.bias is None else out + self.bias


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
