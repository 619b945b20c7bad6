"""What starts the kernels of `fused_moe`. Nothing here waits for the device: who chose whom stays there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...common.scratch import with_scratch
from ..grouped_gemm import kernel as grouped
from ..grouped_gemm.configs import rows_aligned
from ..moe_permute.kernel import sort_by_expert
from . import kernel
from .configs import swiglu_config

# Of a row, by 128 threads: 16 bytes of bfloat16 each.
SUM_COLUMNS = 1024


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _generation(device: torch.device) -> int:
    cuda = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device)[0] if cuda else 0


def _first_product(
    x: Tensor, gate_up: Tensor, rows: int, table_of: Callable[[int], Tensor], order: Tensor | None, choices: int
) -> Tensor:
    """[P, I]: SwiGLU of both products of rows that are gathered through `order`, or lie in their places."""
    x, (experts, double, depth) = grouped.rows_readable(x), gate_up.shape
    width = double // 2
    out = x.new_empty(rows, width)
    aligned = gate_up.is_contiguous() and rows_aligned(x, gate_up.flatten(0, 1))
    config = swiglu_config(rows, experts, aligned, order is not None, _generation(x.device))
    table = table_of(config.rows)
    tiles = (table.shape[0] - 1) * _cdiv(width, config.columns)
    with torch.cuda.device_of(x):
        if config.specialized:
            programs = min(tiles, grouped.processors(x.device))
            operands = (x, gate_up, out, table, rows, experts, width, depth, x.stride(0))
            with_scratch(lambda: kernel.specialized_product_kernel[(programs,)](*operands, **grouped.options(config)))
        else:
            kernel.product_kernel[(tiles,)](
                *(x, table if order is None else order, gate_up, out, table, choices, experts, width, depth),
                *(x.stride(0), *gate_up.stride()),
                GATHER=order is not None,
                **grouped.options(config),
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
    table_of = functools.cache(lambda block: grouped.tile_table(ends, rows, block, nobody=False))
    hidden = _first_product(x, gate_up, rows, table_of, order, choices)
    y = grouped.product(hidden, down, table_of)  # [P, H]
    with torch.cuda.device_of(x):
        kernel.sum_kernel[(out.shape[0], _cdiv(out.shape[1], SUM_COLUMNS))](
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
    return _first_product(x, gate_up, rows, functools.partial(grouped.tile_table, ends, rows), None, 1)


@grouped_gemm_swiglu.register_fake
def _new_hidden(x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate_up.shape[1] // 2)
