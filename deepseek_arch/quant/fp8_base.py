"""Base class of layers with FP8 weights, FP8 values beside their scales, and the product with such weights.

The weights are not trained: they have no gradient, and neither a cast nor a copy may reach the values alone, which mean
nothing without their scales (TRAPS E11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek_kernels import dequantize_blocks, dispatch, fp8_gemm, fp8_grouped_gemm, quantize_rows
from deepseek_kernels.gemm.fp8_gemm import unsupported_by_triton
from deepseek_kernels.gemm.fp8_weight_gemm import fp8_weight_product as weight_product

from .fp8_blocks import block_grid, decode_scale, quantize_blocks

__all__ = ["ACTIVATIONS", "GROUP", "FP8Layer", "QuantizedProduct"]

ACTIVATIONS = ("auto", "fp8", "high")
GROUP = (128, 128)  # the blocks that FP8 products know


def scale_name(name: str) -> str:
    """Returns the name of the parameter with the scales of `name`, as published checkpoints have it."""
    return f"{name}_scale_inv"


class FP8Layer(nn.Module):
    """Base class of FP8 layers, whose parameters are pairs of FP8 values and scales that only move together.

    Attributes:
        block_size: rows and columns that share a scale.
        scale_format: of the scales that activations get: None or "ue8m0" (`scale_fmt` of `quantization_config`).
        compute_dtype: of the activations that the layer was made for; follows `.to(dtype)`. PEFT gives adapters this
            dtype.
    """

    quantized_params: ClassVar[dict[str, int]]
    """Names of the FP8 parameters, and the number of stacked matrices in each, which have a grid of scales each."""

    block_size: tuple[int, int]
    scale_format: str | None
    compute_dtype: torch.dtype

    def register_quantized(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        block_size: tuple[int, int],
        scale_format: str | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        """Registers FP8 parameters of these shapes, zeros, beside their scales, ones.

        Raises:
            ValueError: an unknown scale format, or no block size.
        """
        if len(block_size) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in block_size):
            raise ValueError(f"expected block_size to be two positive integers, got {block_size!r:.200}")
        if scale_format not in (None, "ue8m0"):
            raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
        self.block_size, self.scale_format = (block_size[0], block_size[1]), scale_format
        self.activations = "auto"
        self.compute_dtype = dtype or torch.get_default_dtype()
        for name, (*stack, rows, columns) in shapes.items():
            parts = self.quantized_params[name]
            down, across = block_grid((rows // parts, columns), self.block_size)
            codes = torch.zeros(*stack, rows, columns, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.ones(*stack, parts * down, across, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            self.register_parameter(scale_name(name), nn.Parameter(scale, requires_grad=False))

    @property
    def activations(self) -> str:
        """Treatment of activations: "auto", "fp8" (W8A8 on any device, emulated if need be) or "high"."""
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        if value not in ACTIVATIONS:
            raise ValueError(f"expected activations to be one of {', '.join(ACTIVATIONS)}, got {value!r}")
        if value == "fp8" and self.block_size != GROUP:
            raise ValueError(f"expected blocks of 128 x 128 for activations='fp8', got {list(self.block_size)}")
        self._activations = value

    def _quantizes(self, op: str, device: torch.device) -> bool:
        """Returns True if the activations become FP8."""
        if self.activations != "auto":
            return self.activations == "fp8"
        if self.block_size != GROUP:
            return False
        return dispatch.pick(op, device, unsupported_by_triton()) == "triton"

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the FP8 values and the scales of a parameter, whatever parametrizations it has."""
        outer = self._parametrizations()
        codes = outer[name].original if name in outer else getattr(self, name)
        return codes, getattr(self, scale_name(name))

    def dequantized(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns the whole of a parameter, dequantized, in `dtype`.

        A parametrization, such as PEFT's adapters of expert parameters, acts on the result, not on the FP8 values.
        """
        weight = dequantize_blocks(*self.pair(name), self.block_size, dtype, self.quantized_params[name])
        outer = self._parametrizations()
        if name in outer:
            for parametrization in outer[name]:
                weight = parametrization(weight)
        return weight.to(dtype)

    def _parametrizations(self) -> Mapping[str, Any]:
        return getattr(self, "parametrizations", {})

    def quantize_(self, **weights: Tensor) -> None:
        """Takes the FP8 values and scales of these weights; on the meta device, where there are none, does nothing."""
        for name, weight in weights.items():
            if not weight.is_meta:
                made = quantize_blocks(weight.detach(), self.block_size, self.scale_format, self.quantized_params[name])
                for key, value in zip((name, scale_name(name)), made, strict=True):
                    setattr(self, key, nn.Parameter(value, requires_grad=False))

    def reset_parameters(self, *args: Any) -> None:
        """Does nothing: FP8 values are loaded, or made from weights, never drawn."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        own = {id(self._parameters.get(key)) for name in self.quantized_params for key in (name, scale_name(name))}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            # As integers, which casts leave alone; a function that changes them all the same may choose the device.
            bits = tensor.detach().view({1: torch.uint8, 4: torch.int32}[tensor.element_size()])
            moved = fn(bits)
            return moved.view(tensor.dtype) if moved.dtype == bits.dtype else tensor.detach().to(moved.device)

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        wrong = []
        for name in self.quantized_params:
            for key, tensor in zip((name, scale_name(name)), self.pair(name), strict=True):
                given = state_dict.get(prefix + key)
                if given is not None and given.dtype != tensor.dtype:
                    wrong.append(f"{prefix}{key}: expected {tensor.dtype}, got {given.dtype}")
                elif given is not None and key == scale_name(name) and not given.is_meta:
                    wrong += _refused_scales(f"{prefix}{key}", given)
        if wrong:  # a copy would cast to FP8 without a scale, or from FP8 without its scale (TRAPS E11)
            errors.extend(wrong)
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    # Plain pickle cannot read float8 tensors back (torch 2.13): processes exchange them as bytes.
    def __getstate__(self) -> dict[str, Any]:
        bits = {name: self.pair(name)[0].detach().view(torch.uint8) for name in self.quantized_params}
        return {**self.__dict__, "_parameters": {**self._parameters, **bits}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.quantized_params:
            codes = state["_parameters"][name].view(torch.float8_e4m3fn)
            self._parameters[name] = nn.Parameter(codes, requires_grad=False)

    def _describe(self) -> str:
        rows, columns = self.block_size
        return f"fp8 in blocks of {rows}x{columns}, activations={self.activations}"


def _refused_scales(name: str, given: Tensor) -> list[str]:
    """Returns what is wrong with scales that a state dict holds, on this rank."""
    try:
        decode_scale((given.to_local() if hasattr(given, "to_local") else given).detach())
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


class QuantizedProduct(torch.autograd.Function):
    """W8A8 GEMM of high-precision rows, dense or grouped by expert.

    Its gradient is that of the GEMM with the dequantized weight; rounding the rows counts as the identity.
    """

    @staticmethod
    def forward(ctx, rows, codes, scale, ends, parts, scale_format, dtype):
        """Multiplies rows [P, K] by codes [N, K] or, with ends [E], [E, N, K] -> [P, N] in `dtype`."""
        ctx.save_for_backward(codes, scale, ends)
        ctx.parts, ctx.dtype = parts, rows.dtype
        quantized = quantize_rows(rows, scale_format)
        if ends is None:
            return fp8_gemm(*quantized, codes, scale, dtype)
        return fp8_grouped_gemm(*quantized, codes, scale, ends, dtype, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        codes, scale, ends = ctx.saved_tensors
        if ends is None:
            codes, scale = codes[None], scale[None]
        grad_rows = weight_product(grad, codes, scale, ends, *GROUP, ctx.parts, True)
        return grad_rows.to(ctx.dtype), None, None, None, None, None, None
