"""What starts the kernels of `mla_decode`: custom operators, opaque to torch.compile, which have fakes for shapes.

Nothing here looks at values on the device, so that everything can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...common.masks import is_spans
from ...common.scratch import with_scratch
from ...quant.fp8_quantize.reference import GROUP
from . import kernel
from .configs import config_for, splits_for
from .packing import views

SUM_ROWS, SUM_COLUMNS, SUM_STEP = 4, 128, 8


@torch.library.custom_op("deepseek_kernels::mla_decode_triton", mutates_args=())
def decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None) -> Tensor:
    kind = "causal" if mask is None else "spans" if is_spans(mask) else "dense"
    batch, queries, keys = *q.shape[:2], states.shape[1]
    arguments: dict[str, Any] = {}
    if kind == "spans":
        arguments = {"mask": mask.contiguous()}
    elif kind == "dense":
        full = mask.expand(batch, 1, queries, keys)
        strides = {"mask_batch": full.stride(0), "mask_query": full.stride(2), "mask_key": full.stride(3)}
        arguments = {"mask": full.view(torch.uint8), **strides}
    return _decode(q, states, kv_lora_rank, scale, keys, {"MASK": kind, "PAGE": 0, **arguments})


@torch.library.custom_op("deepseek_kernels::mla_decode_paged_triton", mutates_args=())
def decode_paged(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
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
    q, states = _rows_readable(q), _rows_readable(states)
    operands, constants = _keys(states, latent, q.shape[3] - latent)
    config = config_for(rows, q.dtype, bool(constants["GROUPS"]), capability(q.device))
    if page := arguments["PAGE"]:  # a tile lies in one page
        config = dataclasses.replace(config, keys=min(config.keys, page))
    blocks = -(-rows // config.rows)
    splits = splits_for(batch, blocks, keys, config, processors(q.device))
    aligned = constants.pop("ALIGNED")
    bulk = config.bulk and aligned and latent * q.itemsize % 16 == 0
    parts = log_sums = None
    if splits > 1:
        parts = torch.empty(batch, splits, rows, latent, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(batch, splits, rows, dtype=torch.float32, device=q.device)
    strides = {"q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2)}
    absent: dict[str, Any] = {"mask": None, "table": None, "lengths": None}
    absent |= dict.fromkeys(("mask_batch", "mask_query", "mask_key", "table_stride"), 0)
    with torch.cuda.device_of(q):
        start = functools.partial(
            kernel.decode_kernel[(batch * splits * blocks,)],
            q=q,
            **operands,
            out=out if parts is None else parts,
            log_sums=log_sums,
            factor=scale * math.log2(math.e),
            **{"rows": rows, "heads": heads, "queries": queries, "keys": keys, "splits": splits},
            **strides,
            **{**absent, **arguments},
            **constants,
            **{"BULK": bulk, "PARTIAL": parts is not None},
            **config.blocks,
            **config.options,
        )
        with_scratch(start) if bulk else start()
        if parts is not None:
            kernel.sum_kernel[batch * -(-rows // SUM_ROWS), -(-latent // SUM_COLUMNS)](
                *(parts, log_sums, out, rows, splits),
                LATENT=latent,
                ROWS=SUM_ROWS,
                COLUMNS=SUM_COLUMNS,
                SPLITS=_power_of_two(splits),
                STEP=SUM_STEP,
                num_warps=4,
            )
    return out


def _keys(states: Tensor, latent: int, rotated: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's operands and constants that say where keys are and how long they are."""
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
        "COLUMNS": max(16, _power_of_two(latent)),
        "EXTRA": max(16, _power_of_two(rotated)),
        "UNIT": 16 if whole else 4,
        "ALIGNED": whole and (latents.data_ptr() | keys.data_ptr()) % 16 == 0,
    }
    constants["GROUPS"] = max(1, constants["COLUMNS"] // GROUP) if packed else 0
    return {"latents": latents, "scales": scales, "rotated": keys, "batch_stride": batch_stride}, constants


def _rows_readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(number: int) -> int:
    """The least power of two from `number` on."""
    return 1 << (number - 1).bit_length()


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device, or as if the interpreter were a Hopper GPU; None for an AMD GPU."""
    if device.type != "cuda":
        return 9, 0
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter so few that some of the programs wait."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
