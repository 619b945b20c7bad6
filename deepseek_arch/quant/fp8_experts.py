"""Stacked experts that keep their weights in block-scaled FP8."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from deepseek_kernels import (
    dispatch,
    fp8_grouped_gemm,
    fp8_weight_fused_moe,
    fp8_weight_grouped_gemm,
    grouped_gemm,
    permute,
    quantize_rows,
    sort_by_expert,
    swiglu_quantize,
    unpermute,
)
from deepseek_kernels.common.activations import SILU, gated

from ..config.argument_types import Size, check_types
from ..moe.moe import Experts
from .fp8_base import GROUP, FP8Layer, QuantizedProduct

__all__ = ["FP8Experts"]


@check_types
class FP8Experts(FP8Layer, Experts):
    """E gated experts whose weights stay in FP8.

    Parameters:
        gate_up_proj: [E, 2 I, H] float8_e4m3fn, each expert's gate rows above its up rows.
        gate_up_proj_scale_inv: [E, 2 ceil(I / block_rows), ceil(H / block_columns)] float32: gate and up are two
            matrices with a grid each, as they are published, also where a block would reach from one into the other.
        down_proj: [E, H, I] float8_e4m3fn.
        down_proj_scale_inv: [E, ceil(H / block_rows), ceil(I / block_columns)] float32.
    """

    quantized_params: ClassVar = {"gate_up_proj": 2, "down_proj": 1}

    def __init__(
        self,
        num_experts: Size,
        hidden_size: Size,
        intermediate_size: Size,
        block_size: tuple[int, int] = GROUP,
        *,
        scale_format: str | None = None,
        activation: str = "silu",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        self.activation = activation
        shapes = {
            "gate_up_proj": (num_experts, 2 * intermediate_size, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
        }
        self.register_quantized(shapes, block_size, scale_format, device, dtype)

    @classmethod
    def quantize(
        cls, experts: Experts, block_size: tuple[int, int] = GROUP, scale_format: str | None = None
    ) -> FP8Experts:
        """Returns the same experts with their weights in FP8; on the meta device only the shapes.

        Raises:
            ValueError: a weight is not finite.
        """
        sizes, dtype = (experts.num_experts, experts.hidden_dim, experts.intermediate_dim), experts.gate_up_proj.dtype
        made = cls(
            *sizes, block_size, scale_format=scale_format, activation=experts.activation, device="meta", dtype=dtype
        )
        made.quantize_(gate_up_proj=experts.gate_up_proj, down_proj=experts.down_proj)
        return made.train(experts.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Returns gate_up_proj [E, 2 I, H] and down_proj [E, H, I] dequantized, in `dtype` or `compute_dtype`."""
        dtype = dtype or self.compute_dtype
        return self.dequantized("gate_up_proj", dtype), self.dequantized("down_proj", dtype)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Computes `Experts.forward`."""
        (x,) = dispatch.autocast(x)
        adapted = hasattr(self, "parametrizations")
        quantizes = not adapted and self._quantizes("fp8_grouped_gemm", x.device)
        if not adapted and not quantizes and self.activation in SILU:
            codes_and_scales = *self.pair("gate_up_proj"), *self.pair("down_proj")
            return fp8_weight_fused_moe(x, *codes_and_scales, expert_ids, weights, self.block_size)
        order, inverse, ends = sort_by_expert(expert_ids, self.pair("gate_up_proj")[0].shape[0])
        if quantizes:
            out = self._quantized(x, order, inverse, ends)
        else:
            rows = permute(x, order, inverse)  # [T K, H]
            halves = self._grouped_gemm(rows, "gate_up_proj", ends).chunk(2, dim=-1)  # [T K, I] each
            out = self._grouped_gemm(gated(self.activation, *halves), "down_proj", ends)  # [T K, H]
        return unpermute(out, weights, order, inverse)

    def _grouped_gemm(self, rows: Tensor, name: str, ends: Tensor) -> Tensor:
        if name in getattr(self, "parametrizations", ()):
            return grouped_gemm(rows, self.dequantized(name, rows.dtype), ends)
        return fp8_weight_grouped_gemm(rows, *self.pair(name), ends, self.block_size, self.quantized_params[name])

    def _quantized(self, x: Tensor, order: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
        """Runs the W8A8 GEMMs. With gradients they are two functions of high-precision rows, with the same numbers."""
        up, down, form = self.pair("gate_up_proj"), self.pair("down_proj"), self.scale_format
        if torch.is_grad_enabled() and x.requires_grad:
            rows = permute(x, order, inverse)
            gate_up = QuantizedProduct.apply(rows, *up, ends, 2, form, x.dtype)
            hidden = self._hidden(gate_up)
            return QuantizedProduct.apply(hidden, *down, ends, 1, form, x.dtype)
        # A token is quantized once, not once for each of its experts.
        codes, scale = quantize_rows(x, form)
        codes = permute(codes.view(torch.uint8), order, inverse).view(torch.float8_e4m3fn)
        gate_up = fp8_grouped_gemm(codes, permute(scale, order, inverse), *up, ends, x.dtype, 2)
        fused = self.activation in SILU
        codes, scale = swiglu_quantize(gate_up, form) if fused else quantize_rows(self._hidden(gate_up), form)
        return fp8_grouped_gemm(codes, scale, *down, ends, x.dtype)

    def _hidden(self, gate_up: Tensor) -> Tensor:
        """Returns the gated rows in float32, not rounded before they are quantized, as in `swiglu_quantize`."""
        return gated(self.activation, *gate_up.float().chunk(2, dim=-1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"
