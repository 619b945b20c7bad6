"""Launches the kernels of `grouped_gemm`: a custom operator, opaque to torch.compile, and its derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...common.autograd import connect_product
from ...common.descriptors import with_scratch
from ...common.host import cdiv, hopper, processors, rows_readable
from ...common.tiles import tile_table
from . import backward, kernel
from .configs import WIDE, gradient_config, product_config, rows_aligned

__all__ = ["grouped_gemm", "product"]


def product(x: Tensor, weight: Tensor, table_of: Callable[[int], Tensor], transposed: bool = False) -> Tensor:
    """Multiplies each expert's rows of x [P, D] by its weight, [E, W, D] or, `transposed`, [E, D, W] -> [P, W].

    Args:
        table_of: returns the `tile_table` for a number of rows.
    """
    x, (rows, depth), experts = rows_readable(x), x.shape, weight.shape[0]
    width_at, depth_at = (2, 1) if transposed else (1, 2)
    width = weight.shape[width_at]
    out = x.new_empty(rows, width)
    if not out.numel():
        return out
    aligned = weight.is_contiguous() and rows_aligned(x, weight.flatten(0, 1))
    specialized = hopper(x.device) and not (transposed and depth % WIDE.depth)
    config = product_config(rows, experts, width, aligned, specialized)
    table, sizes = table_of(config.rows), (experts, width, depth)
    tiles = (table.shape[0] - 1) * cdiv(width, config.columns)
    with torch.cuda.device_of(x):
        if config.specialized:
            run = kernel.specialized_product_kernel[(min(tiles, processors(x.device)),)]
            operands = (x, weight, out, table, rows, sizes, x.stride(0))
            with_scratch(lambda: run(*operands, BACKWARD=transposed, **config.options))
        else:
            strides = weight.stride(0), weight.stride(width_at), weight.stride(depth_at)
            kernel.product_kernel[(tiles,)](x, weight, out, table, sizes, x.stride(0), strides, **config.options)
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grad [P, N] and x [P, K] -> [E, N, K]."""
    grad, x, out = rows_readable(grad), rows_readable(x), weight.new_empty(weight.shape)
    if not out.numel():
        return out
    (experts, height, width), rows = weight.shape, x.shape[0]
    config = gradient_config(rows, experts, x.element_size() == 2, rows_aligned(grad, x) and hopper(x.device))
    run = backward.specialized_gradient_kernel if config.specialized else backward.gradient_kernel
    programs = experts * cdiv(height, config.rows) * cdiv(width, config.columns)
    with torch.cuda.device_of(x):
        arguments = (grad, x, out, ends.contiguous(), (rows, height, width), (grad.stride(0), x.stride(0)))
        with_scratch(lambda: run[(programs,)](*arguments, **config.options))
    return out


@torch.library.custom_op("deepseek_kernels::grouped_gemm_triton", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return product(x, weight, functools.partial(tile_table, ends, x.shape[0]))


@torch.library.custom_op("deepseek_kernels::grouped_gemm_triton_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    table_of = functools.partial(tile_table, ends, x.shape[0])
    grad_x = product(grad, weight, table_of, transposed=True) if need_x else x.new_empty(0)
    return grad_x, _weight_gradient(grad, x, weight, ends) if need_weight else weight.new_empty(0)


grouped_gemm = connect_product(_product, _backward)
