"""FP8 product in PyTorch: the codes dequantized to float32, and float32 products.

The weight a band of rows at a time: a float32 copy of it has four times its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.fp8_quantize.reference import GROUP, decode, empty_codes

BAND = 4 * GROUP  # rows: 14 MB of float32 at 7168 columns


def new_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
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
    """`out` [M, N] = wide [M, K] float32 times the codes b [N, K] dequantized, whose scales are for blocks or rows."""
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
    """[R, K] codes and [R, ceil(K / 128)] scales -> float32."""
    return decode(codes) * scale.repeat_interleave(GROUP, 1)[:, : codes.shape[1]]


def transposed(codes: Tensor) -> Tensor:
    out = empty_codes(codes.shape[1], codes.shape[0], codes.device)
    out.view(torch.uint8).copy_(codes.view(torch.uint8).T)
    return out
