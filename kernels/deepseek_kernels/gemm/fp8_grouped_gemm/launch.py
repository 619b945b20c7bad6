"""Launches the kernels of `fp8_grouped_gemm`. Nothing here waits for the device: `ends` stay there."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.descriptors import with_scratch
from ...common.fp8 import GROUP
from ...common.host import cdiv, hopper, power_of_two, processors
from ...common.tiles import tile_table
from ..fp8_gemm.launch import aligned, operand
from . import backward, kernel
from .configs import gradient_config, product_config
from .reference import new_gradient, new_product

__all__ = ["multiply", "weight_gradient"]


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
    expert_stride, *scale_strides = weight_scale.stride()
    left, right = operand(x, x_scale), (weight, weight_scale, weight.stride(0), *scale_strides)
    sizes, part_sizes = (experts, width, x.shape[1]), (width // parts, blocks, parts * blocks)
    with torch.cuda.device_of(x):
        table = tile_table(ends, x.shape[0], config.columns if config.swapped else config.rows)
        tiles = (table.shape[0] - 1) * parts * blocks  # the most that there can be; the table has their true number
        if config.specialized:
            run = kernel.specialized_kernel[(min(tiles, processors(x.device)),)]
            arguments = (left, right, out, table, x.shape[0], sizes, part_sizes, expert_stride)
            with_scratch(lambda: run(*arguments, **config.constants, **config.options))
        else:
            kernel.plain_kernel[(tiles,)](
                *(left, right, out, table, sizes, part_sizes, expert_stride),
                SWAPPED=config.swapped,
                **config.constants,
                **config.options,
            )
    return out


@torch.library.custom_op("deepseek_kernels::fp8_grouped_wgrad", mutates_args=())
def weight_gradient(
    grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    out = new_gradient(grad_t, grad_scale, x_t, x_scale, ends, dtype)
    columns = grad_t.shape[1]
    if not (out.numel() and columns):
        return out.zero_()
    experts, height, width = out.shape
    config = gradient_config(columns, experts, hopper(out.device))
    tiles = experts * config.tiles(height, width)
    left, right = operand(aligned(grad_t), grad_scale), operand(aligned(x_t), x_scale)
    with torch.cuda.device_of(out):
        starts, sizes = _starts(ends, columns // GROUP), (height, width, columns)
        if config.specialized:
            run = backward.specialized_gradient_kernel[(min(tiles, processors(out.device)),)]
            arguments = (left, right, out, starts, experts, sizes)
            with_scratch(lambda: run(*arguments, **config.constants, **config.options))
        else:
            run = backward.plain_gradient_kernel[(tiles,)]
            run(left, right, out, starts, sizes, **config.constants, **config.options)
    return out


def _starts(ends: Tensor, capacity: int) -> Tensor:
    experts = ends.shape[0]
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ends.device)
    backward.starts_kernel[(1,)](
        *(ends.contiguous(), starts, experts, capacity), EXPERTS=power_of_two(max(experts, 2)), num_warps=4
    )
    return starts


multiply.register_fake(new_product)
weight_gradient.register_fake(new_gradient)
