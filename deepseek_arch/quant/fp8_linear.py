"""Linear layer that keeps its weight in block-scaled FP8."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from deepseek_kernels import dense_gemm, dispatch, fp8_gemm, fp8_weight_gemm

from ..config.argument_types import Size, check_types
from ..layers.linear import Linear, QuantizedRows
from .fp8_base import GROUP, FP8Layer, QuantizedProduct

__all__ = ["FP8Linear"]


@check_types
class FP8Linear(FP8Layer, Linear):
    """A linear layer whose weight stays in FP8.

    Parameters:
        weight: [out_features, in_features] float8_e4m3fn.
        weight_scale_inv: [ceil(out_features / block_rows), ceil(in_features / block_columns)] float32; despite its name
            the FP8 values are multiplied by it (TRAPS E1).
        bias: [out_features] in `dtype`, if there is one.
    """

    quantized_params: ClassVar = {"weight": 1}
    weight_scale_inv: nn.Parameter

    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        bias: bool = False,
        block_size: tuple[int, int] = GROUP,
        *,
        scale_format: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_quantized({"weight": (out_features, in_features)}, block_size, scale_format, device, dtype)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def quantize(
        cls, linear: nn.Linear, block_size: tuple[int, int] = GROUP, scale_format: str | None = None
    ) -> FP8Linear:
        """Returns the same layer with its weight in FP8, and the same bias; on the meta device only the shapes.

        Raises:
            ValueError: a weight is not finite.
        """
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        made = cls(*sizes, False, block_size, scale_format=scale_format, device="meta", dtype=dtype)
        made.quantize_(weight=linear.weight)
        made.bias = linear.bias
        return made.train(linear.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dequantized weight, [out_features, in_features] in `dtype` (default `compute_dtype`)."""
        return self.dequantized("weight", dtype or self.compute_dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the dequantized matrix, as `Linear.dense_weight`."""
        return self.dequantize(dtype)

    def fp8_weight(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Returns the FP8 values, their scales and the block size: the matrix as it is stored."""
        return self.weight, self.weight_scale_inv, self.block_size

    def norm_consumers(self) -> tuple[nn.Module, ...]:
        """Returns this layer, as `Linear.norm_consumers`."""
        return (self,)

    def takes_fp8(self, device: torch.device) -> bool:
        """Returns True if activations on this device become FP8 for the product."""
        return not hasattr(self, "parametrizations") and self._quantizes("fp8_gemm", device)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Multiplies [..., in_features] by the weight -> [..., out_features]."""
        if isinstance(x, QuantizedRows):
            out = fp8_gemm(x.codes, x.scale, self.weight, self.weight_scale_inv, x.dtype)
            out = out.reshape(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        (x,) = dispatch.autocast(x)
        if hasattr(self, "parametrizations"):
            out = dense_gemm(x, self.dequantize(x.dtype))
        elif self.takes_fp8(x.device):
            rows = x.reshape(-1, self.in_features)
            out = QuantizedProduct.apply(rows, self.weight, self.weight_scale_inv, None, 1, self.scale_format, x.dtype)
            out = out.reshape(*x.shape[:-1], self.out_features)
        else:
            out = fp8_weight_gemm(x, self.weight, self.weight_scale_inv, self.block_size)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"
