"""What a layer with FP8 weights is made of: codes and scales that no cast may touch, and the product with them.

The weights are not trained: they have no gradient, and neither a cast nor a copy may reach them alone, since codes
without their scales mean nothing (TRAPS E11).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek_kernels import dequantize_blocks, dispatch, fp8_gemm, fp8_grouped_gemm, quantize_rows
from deepseek_kernels.gemm.fp8_gemm import unsupported_by_triton
from deepseek_kernels.gemm.fp8_weight_gemm import fp8_weight_product as weight_product

from .fp8_blocks import block_grid, quantize_blocks

__all__ = ["ACTIVATIONS", "GROUP", "FP8Layer", "QuantizedProduct"]

ACTIVATIONS = ("auto", "fp8", "high")
GROUP = (128, 128)  # the blocks that FP8 products know


def scale_name(name: str) -> str:
    """Returns the name of the parameter with the scales of `name`, as published checkpoints have it."""
    return f"{name}_scale_inv"


class FP8Layer(nn.Module):
    """What both kinds of layer share: parameters in pairs of codes and scales, and what may not happen to them.

    Attributes:
        block_size: rows and columns that share a scale.
        scale_format: of the scales that activations get: None or "ue8m0" (`scale_fmt` of `quantization_config`).
        compute_dtype: of the activations that the layer was made for; follows `.to(dtype)`. PEFT gives adapters this
            dtype.
    """

    held: ClassVar[dict[str, int]]
    """Parameters with codes, and how many stacked matrices each is, with a grid of scales of its own."""

    def _hold(
        self,
        shapes: dict[str, tuple[int, ...]],
        block_size: tuple[int, int],
        scale_format: str | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        if scale_format not in (None, "ue8m0"):
            raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
        self.block_size, self.scale_format = (int(block_size[0]), int(block_size[1])), scale_format
        self.activations = "auto"
        self.compute_dtype = dtype or torch.get_default_dtype()
        for name, (*stack, rows, columns) in shapes.items():
            parts = self.held[name]
            down, across = block_grid((rows // parts, columns), self.block_size)
            codes = torch.zeros(*stack, rows, columns, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.ones(*stack, parts * down, across, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            self.register_parameter(scale_name(name), nn.Parameter(scale, requires_grad=False))

    @property
    def activations(self) -> str:
        """How the product treats activations: "auto", "fp8" (W8A8 on any device, emulated where need be) or "high"."""
        return self._activations

    @activations.setter
    def activations(self, value: str) -> None:
        if value not in ACTIVATIONS:
            raise ValueError(f"expected activations to be one of {', '.join(ACTIVATIONS)}, got {value!r}")
        if value == "fp8" and self.block_size != GROUP:
            raise ValueError(f"expected blocks of 128 x 128 for activations='fp8', got {list(self.block_size)}")
        self._activations = value

    def _quantizes(self, op: str, device: torch.device) -> bool:
        """Whether the activations become FP8."""
        if self.activations != "auto":
            return self.activations == "fp8"
        if self.block_size != GROUP:
            return False
        return dispatch.pick(op, device, unsupported_by_triton()) == "triton"

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The codes and scales of a parameter, whatever parametrizations it has."""
        outer = getattr(self, "parametrizations", {})
        codes = outer[name].original if name in outer else self._parameters[name]
        return codes, getattr(self, scale_name(name))

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        """What a parameter means, in `dtype`: the whole of it, dequantized.

        A parametrization, such as PEFT's adapters of expert parameters, acts on these values, not on the codes.
        """
        weight = dequantize_blocks(*self.pair(name), self.block_size, dtype, self.held[name])
        if name in getattr(self, "parametrizations", {}):
            for parametrization in self.parametrizations[name]:
                weight = parametrization(weight)
        return weight.to(dtype)

    def quantize_(self, **weights: Tensor) -> None:
        """Takes the codes and scales of these weights; on the meta device, where there are none, nothing."""
        for name, weight in weights.items():
            if not weight.is_meta:
                made = quantize_blocks(weight.detach(), self.block_size, self.scale_format, self.held[name])
                for key, value in zip((name, scale_name(name)), made, strict=True):
                    setattr(self, key, nn.Parameter(value, requires_grad=False))

    def reset_parameters(self, *args: Any) -> None:
        """Nothing: codes are loaded, or made from weights, never drawn."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        held = {id(self._parameters.get(key)) for name in self.held for key in (name, scale_name(name))}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in held:
                return fn(tensor)
            # As integers, which casts leave alone; what changes them nevertheless may still choose the device.
            bits = tensor.detach().view({1: torch.uint8, 4: torch.int32}[tensor.element_size()])
            moved = fn(bits)
            return moved.view(tensor.dtype) if moved.dtype == bits.dtype else tensor.detach().to(moved.device)

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        wrong = []
        for name in self.held:
            for key, tensor in zip((name, scale_name(name)), self.pair(name), strict=True):
                given = state_dict.get(prefix + key)
                if given is not None and given.dtype != tensor.dtype:
                    wrong.append(f"{prefix}{key}: expected {tensor.dtype}, got {given.dtype}")
        if wrong:  # a copy would cast: values to codes without scales, or codes to values (TRAPS E11)
            errors.extend(wrong)
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    # Plain pickle cannot read float8 tensors back (torch 2.13): processes exchange the codes as bytes.
    def __getstate__(self) -> dict[str, Any]:
        bits = {name: self._parameters[name].detach().view(torch.uint8) for name in self.held}
        return {**self.__dict__, "_parameters": {**self._parameters, **bits}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.held:
            codes = self._parameters[name].view(torch.float8_e4m3fn)
            self._parameters[name] = nn.Parameter(codes, requires_grad=False)

    def _describe(self) -> str:
        rows, columns = self.block_size
        return f"fp8 in blocks of {rows}x{columns}, activations={self.activations}"


class QuantizedProduct(torch.autograd.Function):
    """The W8A8 product of high-precision rows, dense or grouped by expert.

    Its gradient is that of the product with the dequantized weight; rounding the rows counts as the identity.
    """

    @staticmethod
    def forward(ctx, rows, codes, scale, ends, parts, scale_format, dtype):
        """rows [P, K], codes [N, K] or, with ends [E], [E, N, K] -> [P, N] in `dtype`."""
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
        grad_rows = weight_product(grad, codes, scale, ends, *GROUP, ctx.parts, True)  # the weights' other way round
        return grad_rows.to(ctx.dtype), None, None, None, None, None, None
