"""Weights to FP8 in a stream: `Quantizer`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels.quant.fp8_quantize.reference import WEIGHT_FLOOR, scale_of

from ...quant.fp8_blocks import FP8_MAX

__all__ = ["Quantizer"]

# Without its sign, a finite float is an integer below that of infinity, and larger numbers are larger integers.
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Quantizer:
    """`fp8.quantize_blocks`, bit for bit, for one band after the other on a CPU.

    Half as much again as fast: maxima are taken of integers, which also tells whether all values are finite, and every
    buffer is used again, since fresh memory costs as much as the arithmetic.

    Args:
        scale_format: None or "ue8m0", see `fp8.quantize_blocks`.
    """

    def __init__(self, block_size: tuple[int, int], scale_format: str | None = None) -> None:
        self.block_size, self.scale_format = block_size, scale_format
        self._buffers: dict[torch.dtype, Tensor] = {}

    def quantize(self, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        """Fills `codes` [R, C] float8_e4m3fn and `scale` [ceil(R / block rows), ceil(C / block columns)] float32.

        Args:
            weight: [R, C] float32, bfloat16 or float16.

        Raises:
            ValueError: a value is not finite.
        """
        (block_rows, block_columns), columns = self.block_size, weight.shape[1]
        for part, target, own in zip(weight.split(block_rows), codes.split(block_rows), scale, strict=True):
            padded = F.pad(self._largest(part), (0, len(own) * block_columns - columns))
            amax = padded.view(len(own), block_columns).amax(1)
            own.copy_(scale_of(amax, WEIGHT_FLOOR, self.scale_format == "ue8m0"))
            wide = self._buffer(part.shape, torch.float32).copy_(part)
            wide.div_(own.repeat_interleave(block_columns)[:columns])
            target.copy_(wide.clamp_(-FP8_MAX, FP8_MAX))  # TRAPS E6

    def _largest(self, weight: Tensor) -> Tensor:
        """[C] float32: the largest magnitude of each column."""
        bits = weight.view(_BITS[weight.dtype])
        magnitude = self._buffer(bits.shape, bits.dtype)
        torch.bitwise_and(bits, torch.iinfo(bits.dtype).max, out=magnitude)
        largest = magnitude.amax(0).view(weight.dtype).float()
        if not largest.isfinite().all():
            raise ValueError("expected finite weights, got NaN or infinity")
        return largest

    def _buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        held = self._buffers.get(dtype)
        if held is None or held.numel() < shape.numel():
            held = self._buffers[dtype] = torch.empty(shape.numel(), dtype=dtype, device="cpu")
        return held[: shape.numel()].view(shape)
