"""Grouped FP8 products in PyTorch: a loop over the experts that own rows, which are all that is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...common.fp8 import GROUP
from ..fp8_gemm import dequantize, multiply_into

__all__ = ["multiply", "new_gradient", "new_product", "weight_gradient"]


def new_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor, dtype: torch.dtype, parts: int
) -> Tensor:
    """Returns an empty result."""
    return torch.empty(x.shape[0], weight.shape[1], dtype=dtype, device=x.device)


def new_gradient(
    grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns an empty gradient."""
    return torch.empty(ends.shape[0], grad_t.shape[0], x_t.shape[0], dtype=dtype, device=grad_t.device)


def _groups(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields number, first row and end of each expert that owns rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, start, end
        start = end


# Custom operators, because the loops' bounds are data: torch.compile sees opaque nodes. Autocast reaches into them, and
# would round the float32 products.
@torch.library.custom_op("deepseek_kernels::fp8_grouped_gemm_reference", mutates_args=())
def multiply(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor, dtype: torch.dtype, parts: int
) -> Tensor:
    out = new_product(x, x_scale, weight, weight_scale, ends, dtype, parts).zero_()
    width, grid = weight.shape[1] // parts, weight_scale.shape[1] // parts
    with torch.autocast(x.device.type, enabled=False):
        for expert, start, end in _groups(ends):
            wide = dequantize(x[start:end], x_scale[start:end])
            for part in range(parts):
                own, scales = slice(part * width, (part + 1) * width), slice(part * grid, (part + 1) * grid)
                multiply_into(out[start:end, own], wide, weight[expert, own], weight_scale[expert, scales])
    return out


multiply.register_fake(new_product)


@torch.library.custom_op("deepseek_kernels::fp8_grouped_wgrad_reference", mutates_args=())
def weight_gradient(
    grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    out = new_gradient(grad_t, grad_scale, x_t, x_scale, ends, dtype).zero_()
    first = 0
    with torch.autocast(grad_t.device.type, enabled=False):
        for expert, start, end in _groups(ends):
            groups = slice(first, first - (start - end) // GROUP)
            tokens = slice(groups.start * GROUP, groups.stop * GROUP)
            wide = dequantize(grad_t[:, tokens], grad_scale[:, groups])
            multiply_into(out[expert], wide, x_t[:, tokens], x_scale[:, groups])
            first = groups.stop
    return out


weight_gradient.register_fake(new_gradient)
