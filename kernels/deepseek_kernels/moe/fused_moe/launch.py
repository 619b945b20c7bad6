"""Launches the kernels of `fused_moe`. Nothing here waits for the device: the experts' choice stays there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...common.descriptors import with_scratch
from ...common.host import capability, cdiv, processors, rows_readable
from ...common.tiles import tile_table
from ..grouped_gemm.configs import rows_aligned
from ..grouped_gemm.launch import product
from ..moe_permute.launch import sort_by_expert
from . import kernel
from .configs import SUM_COLUMNS, swiglu_config

__all__ = ["fused_moe", "grouped_gemm_swiglu"]


def _first_product(
    x: Tensor, gate_up: Tensor, rows: int, table_of: Callable[[int], Tensor], order: Tensor | None, choices: int
) -> Tensor:
    """[P, I]: SwiGLU of both products of rows that are gathered through `order`, or in their places."""
    x, (experts, double, depth) = rows_readable(x), gate_up.shape
    width = double // 2
    out = x.new_empty(rows, width)
    aligned = gate_up.is_contiguous() and rows_aligned(x, gate_up.flatten(0, 1))
    generation = (capability(x.device) or (0, 0))[0]
    config = swiglu_config(rows, experts, aligned, order is not None, generation)
    table, sizes = table_of(config.rows), (experts, width, depth)
    tiles = (table.shape[0] - 1) * cdiv(width, config.columns)
    with torch.cuda.device_of(x):
        if config.specialized:
            run = kernel.specialized_swiglu_product_kernel[(min(tiles, processors(x.device)),)]
            operands = (x, gate_up, out, table, rows, sizes, x.stride(0))
            with_scratch(lambda: run(*operands, **config.options))
        else:
            kernel.swiglu_product_kernel[(tiles,)](
                *(x, table if order is None else order, gate_up, out, table, choices, sizes),
                *(x.stride(0), gate_up.stride()),
                GATHER=order is not None,
                **config.options,
            )
    return out


@torch.library.custom_op("deepseek_kernels::fused_moe", mutates_args=())
def fused_moe(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    out, experts, choices = _new_sum(x, gate_up, down, expert_ids, weights), gate_up.shape[0], expert_ids.shape[1]
    if not (out.numel() and experts and choices):
        return out.zero_()
    order, inverse, ends = sort_by_expert(expert_ids, experts)
    rows = order.shape[0]
    # Choices served elsewhere get no tiles: their rows are neither computed nor written, and `sum_kernel` skips them.
    table_of = functools.cache(lambda block: tile_table(ends, rows, block, unassigned=False))
    hidden = _first_product(x, gate_up, rows, table_of, order, choices)
    y = product(hidden, down, table_of)  # [P, H]
    with torch.cuda.device_of(x):
        kernel.sum_kernel[(out.shape[0], cdiv(out.shape[1], SUM_COLUMNS))](
            *(y, weights.contiguous(), inverse, ends, out, choices, experts, out.shape[1]),
            COLUMNS=SUM_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,  # the reference has no fusion of products into sums
        )
    return out


@fused_moe.register_fake
def _new_sum(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("deepseek_kernels::grouped_gemm_swiglu", mutates_args=())
def grouped_gemm_swiglu(x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
    rows = x.shape[0]
    if not (rows and gate_up.shape[1]):
        return _new_hidden(x, gate_up, ends)
    return _first_product(x, gate_up, rows, functools.partial(tile_table, ends, rows), None, 1)


@grouped_gemm_swiglu.register_fake
def _new_hidden(x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate_up.shape[1] // 2)
