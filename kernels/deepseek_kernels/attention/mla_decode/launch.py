"""Launches the kernels of `mla_decode`: custom operators, opaque to torch.compile.

Nothing here looks at values on the device, so that everything can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...common.descriptors import with_scratch
from ...common.fp8 import GROUP
from ...common.host import capability, cdiv, power_of_two, processors, rows_readable
from ...common.masks import kernel_arguments
from ..packed_latents import views
from . import kernel
from .configs import SUM_COLUMNS, SUM_ROWS, SUM_STEP, config_for, splits_for

__all__ = ["decode", "decode_paged"]


@torch.library.custom_op("deepseek_kernels::mla_decode_triton", mutates_args=())
def decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    batch, queries, keys = *q.shape[:2], states.shape[1]
    arguments = {"PAGE": 0, **kernel_arguments(mask, batch, queries, keys)}
    return _decode(q, states, kv_lora_rank, scale, keys, arguments)


@torch.library.custom_op("deepseek_kernels::mla_decode_paged_triton", mutates_args=())
def decode_paged(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    block_table = rows_readable(block_table)
    arguments = {"table": block_table, "table_stride": block_table.stride(0), "lengths": lengths.contiguous()}
    keys, page = block_table.shape[1] * pages.shape[1], pages.shape[1]
    return _decode(q, pages, kv_lora_rank, scale, keys, {"MASK": "causal", "PAGE": page, **arguments})


@decode.register_fake
def _(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


@decode_paged.register_fake
def _(q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


def _decode(q: Tensor, states: Tensor, latent: int, scale: float, keys: int, arguments: dict[str, Any]) -> Tensor:
    batch, queries, heads, _ = q.shape
    out, rows = q.new_empty(batch, queries, heads, latent), queries * heads
    if not out.numel():
        return out
    if not states.numel():
        return out.zero_()
    q, states = rows_readable(q), rows_readable(states)
    operands, constants = _keys(states, latent, q.shape[3] - latent)
    config = config_for(rows, q.dtype, bool(constants["GROUPS"]), capability(q.device))
    if page := arguments["PAGE"]:  # a tile lies in one page
        config = dataclasses.replace(config, keys=min(config.keys, page))
    blocks = cdiv(rows, config.rows)
    splits = splits_for(batch, blocks, keys, config, processors(q.device))
    aligned = constants.pop("ALIGNED")
    bulk = config.bulk and aligned and latent * q.itemsize % 16 == 0
    parts = log_sums = None
    if splits > 1:
        parts = torch.empty(batch, splits, rows, latent, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(batch, splits, rows, dtype=torch.float32, device=q.device)
    absent = {"mask": None, "mask_strides": (0, 0, 0), "table": None, "table_stride": 0, "lengths": None}
    with torch.cuda.device_of(q):
        run = functools.partial(
            kernel.decode_kernel[(batch * splits * blocks,)],
            q=q,
            **operands,
            out=out if parts is None else parts,
            log_sums=log_sums,
            factor=scale * math.log2(math.e),
            **{"rows": rows, "heads": heads, "queries": queries, "keys": keys, "splits": splits},
            q_strides=q.stride()[:3],
            **{**absent, **arguments},
            **constants,
            **{"BULK": bulk, "PARTIAL": parts is not None},
            **config.blocks,
            **config.options,
        )
        with_scratch(run) if bulk else run()
        if parts is not None:
            kernel.sum_kernel[batch * cdiv(rows, SUM_ROWS), cdiv(latent, SUM_COLUMNS)](
                *(parts, log_sums, out, rows, splits),
                LATENT=latent,
                ROWS=SUM_ROWS,
                COLUMNS=SUM_COLUMNS,
                SPLITS=power_of_two(splits),
                STEP=SUM_STEP,
                num_warps=4,
            )
    return out


def _keys(states: Tensor, latent: int, rotated: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the kernel's operands and constants for the place and the length of keys."""
    batch_stride, token = states.stride(0), states.stride(1)
    packed = states.dtype == torch.uint8
    whole = all(number * states.itemsize % 16 == 0 for number in (batch_stride, token))
    if packed:
        latents, scales, keys = views(states, latent)
    else:
        latents, scales, keys = states, None, states[..., latent:]
    constants = {
        "TOKEN": token,
        "LATENT": latent,
        "ROTATED": rotated,
        "COLUMNS": max(16, power_of_two(latent)),
        "EXTRA": max(16, power_of_two(rotated)),
        "UNIT": 16 if whole else 4,
        "ALIGNED": whole and (latents.data_ptr() | keys.data_ptr()) % 16 == 0,
    }
    constants["GROUPS"] = max(1, constants["COLUMNS"] // GROUP) if packed else 0
    return {"latents": latents, "scales": scales, "rotated": keys, "batch_stride": batch_stride}, constants
