"""FP8 product in PyTorch: FP8 values dequantized to float32, and float32 products.

The weight is dequantized a band of rows at a time: a float32 copy of it has four times its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.fp8 import GROUP, decode, empty_codes

__all__ = ["BAND", "dequantize", "multiply", "multiply_into", "new_product", "transposed"]

BAND = 4 * GROUP  # rows: 14 MB of float32 at 7168 columns


def new_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an empty result."""
    return torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)


# A custom operator: torch.compile sees one node instead of a loop written out.
@torch.library.custom_op("deepseek_kernels::fp8_gemm_reference", mutates_args=())
def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = new_product(a, a_scale, b, b_scale, dtype)
    # Autocast reaches into custom operators, and would round the products below.
    with torch.autocast(a.device.type, enabled=False):
        multiply_into(out, dequantize(a, a_scale), b, b_scale)
    return out


multiply.register_fake(new_product)


def multiply_into(out: Tensor, wide: Tensor, b: Tensor, b_scale: Tensor) -> None:
    """`out` [M, N] = wide [M, K] float32 times b [N, K] dequantized, whose scales are for blocks or rows."""
    by_rows = b_scale.shape[0] == b.shape[0]
    for start in range(0, b.shape[0], BAND):
        codes = b[start : start + BAND]
        if by_rows:
            scales = b_scale[start : start + BAND]
        else:
            blocks = b_scale[start // GROUP : (start + BAND) // GROUP]
            scales = blocks.repeat_interleave(GROUP, 0)[: codes.shape[0]]
        out[:, start : start + BAND] = wide @ dequantize(codes, scales).T


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Dequantizes [R, K] with scales [R, ceil(K / 128)] to float32."""
    return decode(codes) * scale.repeat_interleave(GROUP, 1)[:, : codes.shape[1]]


def transposed(codes: Tensor) -> Tensor:
    """See the operator of this name."""
    out = empty_codes(codes.shape[1], codes.shape[0], codes.device)
    out.view(torch.uint8).copy_(codes.view(torch.uint8).T)
    return out
