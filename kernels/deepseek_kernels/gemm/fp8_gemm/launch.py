"""Launches the kernels of `fp8_gemm`: a custom operator, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.descriptors import with_scratch
from ...common.fp8 import GROUP
from ...common.host import cdiv, hopper, processors
from . import kernel
from .configs import SUM_BLOCK, Config, product_config
from .reference import new_product

__all__ = ["Operand", "aligned", "multiply", "operand"]

# FP8 values, scales, and the strides of a row of values, a row of scales and a group of scales.
Operand = tuple[Tensor, Tensor, int, int, int]


@torch.library.custom_op("deepseek_kernels::fp8_gemm", mutates_args=())
def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = new_product(a, a_scale, b, b_scale, dtype)
    if not out.numel():
        return out
    if not a.shape[1]:
        return out.zero_()
    a, b = aligned(a), aligned(b)
    (rows, columns), depth = out.shape, a.shape[1]
    by_rows = b_scale.shape[0] != cdiv(columns, GROUP)
    config, splits = product_config(rows, columns, depth, by_rows, hopper(a.device), processors(a.device))
    left, right = operand(a, a_scale), operand(b, b_scale)
    with torch.cuda.device_of(a):
        if config.specialized:
            _specialized(left, right, out, depth, by_rows, config)
        elif splits == 1:
            _plain(left, right, out[None], depth, by_rows, config)
        else:
            parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=a.device)
            _plain(left, right, parts, depth, by_rows, config)
            kernel.sum_kernel[(cdiv(out.numel(), SUM_BLOCK),)](
                *(parts, out, out.numel()), SPLITS=splits, BLOCK=SUM_BLOCK, num_warps=4
            )
    return out


multiply.register_fake(new_product)


def _specialized(left: Operand, right: Operand, out: Tensor, depth: int, by_rows: bool, config: Config) -> None:
    programs = min(config.tiles(*out.shape), processors(out.device))
    arguments = (left, right, out, (*out.shape, depth))
    run = kernel.specialized_kernel[(programs,)]
    with_scratch(lambda: run(*arguments, RIGHT_BLOCK=not by_rows, **config.constants, **config.options))


def _plain(left: Operand, right: Operand, parts: Tensor, depth: int, by_rows: bool, config: Config) -> None:
    """Computes `parts` [splits, M, N], which are to be added."""
    splits, rows, columns = parts.shape
    out_split, out_row, out_column = parts.stride()
    blocks = (False, not by_rows)
    if config.swapped:
        left, right, rows, columns, out_row, out_column = right, left, columns, rows, out_column, out_row
        blocks = (True, False)
    kernel.plain_kernel[config.tiles(rows, columns), splits](
        *(left, right, parts, (rows, columns, depth), (out_row, out_column, out_split)),
        BLOCKS=blocks,
        **config.constants,
        **config.options,
    )


def operand(codes: Tensor, scale: Tensor) -> Operand:
    """Returns a matrix of FP8 values and its scales as the kernels take it."""
    return codes, scale, codes.stride(0), scale.stride(0), scale.stride(1)


def aligned(codes: Tensor) -> Tensor:
    """Returns FP8 values as the kernels read them: rows at multiples of 16 bytes, and a multiple of 16 values long.

    Others are copied, with zeros behind each row: a product reads an operand once for each tile of the other one, and
    without 16-byte loads that costs more than the copy. Published shapes and `quantize_rows` of them need none.
    """
    rows, depth = codes.shape
    whole = cdiv(depth, 16) * 16
    if (
        depth == whole
        and codes.stride(1) == 1
        and codes.stride(0) % 16 == 0
        and codes.stride(0) >= depth
        and codes.data_ptr() % 16 == 0
    ):
        return codes
    out = torch.zeros(rows, whole, dtype=torch.uint8, device=codes.device)
    out[:, :depth] = codes.view(torch.uint8)
    return out.view(codes.dtype)
