"""What starts the kernels of `fp8_grouped_gemm`. Nothing here waits for the device: `ends` stay there."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.scratch import with_scratch
from ...moe.grouped_gemm.kernel import tile_table
from ...quant.fp8_quantize.reference import GROUP
from ..fp8_gemm.launch import aligned, cdiv, hopper, processors
from . import kernel
from .configs import BAND, gradient_config, product_config
from .reference import new_gradient, new_product


@torch.library.custom_op("deepseek_kernels::fp8_grouped_gemm", mutates_args=())
def multiply(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor, dtype: torch.dtype, parts: int
) -> Tensor:
    out, (experts, width, depth) = new_product(x, x_scale, weight, weight_scale, ends, dtype, parts), weight.shape
    if not (out.numel() and experts and depth):
        return out.zero_()
    x, weight = aligned(x), aligned(weight.flatten(0, 1))
    blocks = cdiv(width // parts, GROUP)
    config = product_config(x.shape[0], experts, parts * blocks, hopper(x.device), processors(x.device))
    with torch.cuda.device_of(x):
        table = tile_table(ends, x.shape[0], config.columns if config.swapped else config.rows)
        tiles = (table.shape[0] - 1) * parts * blocks  # the most that there can be; how many there are, the table says
        arguments = (
            *(experts, width, x.shape[1], width // parts, blocks, parts * blocks, x.stride(0), weight.stride(0)),
            *(*x_scale.stride(), *weight_scale.stride()),
        )
        options = {**config.blocks, "GROUP": GROUP, "BAND": BAND, **config.options}
        if config.specialized:
            grid = (min(tiles, processors(x.device)),)
            operands = (x, x_scale, weight, weight_scale, out, table, x.shape[0])
            with_scratch(lambda: kernel.specialized_kernel[grid](*operands, *arguments, **options))
        else:
            operands = (x, x_scale, weight, weight_scale, out, table)
            kernel.plain_kernel[(tiles,)](
                *operands, *arguments, **options, SWAPPED=config.swapped, STAGES=config.num_stages
            )
    return out


multiply.register_fake(new_product)


@torch.library.custom_op("deepseek_kernels::fp8_grouped_wgrad", mutates_args=())
def weight_gradient(
    grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    out = new_gradient(grad_t, grad_scale, x_t, x_scale, ends, dtype)
    columns = grad_t.shape[1]
    if not (out.numel() and columns):
        return out.zero_()
    grad_t, x_t = aligned(grad_t), aligned(x_t)
    experts, height, width = out.shape
    config = gradient_config(columns, experts, hopper(out.device))
    tiles = experts * cdiv(height, config.rows) * cdiv(width, config.columns)
    with torch.cuda.device_of(out):
        starts = _starts(ends, columns // GROUP)
        arguments = (
            *(height, width, columns, grad_t.stride(0), x_t.stride(0)),
            *(*grad_scale.stride(), *x_scale.stride()),
        )
        operands = (grad_t, grad_scale, x_t, x_scale, out, starts)
        options = {**config.blocks, "GROUP": GROUP, "BAND": BAND, **config.options}
        if config.specialized:
            grid = (min(tiles, processors(out.device)),)
            with_scratch(lambda: kernel.specialized_gradient_kernel[grid](*operands, experts, *arguments, **options))
        else:
            kernel.plain_gradient_kernel[(tiles,)](*operands, *arguments, **options, STAGES=config.num_stages)
    return out


weight_gradient.register_fake(new_gradient)


def _starts(ends: Tensor, capacity: int) -> Tensor:
    experts = ends.shape[0]
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ends.device)
    kernel.starts_kernel[(1,)](
        *(ends.contiguous(), starts, experts, capacity),
        EXPERTS=1 << max(experts - 1, 1).bit_length(),
        GROUP=GROUP,
        num_warps=4,
    )
    return starts
