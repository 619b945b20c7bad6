"""Launches the kernels of `sparse_mla`: a custom operator, opaque to torch.compile.

Nothing here looks at values on the device, so that everything can be captured in a CUDA graph. Tiles and parts are
those of `mla_decode`, for the heads of one query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...common.fp8 import GROUP
from ...common.host import capability, cdiv, power_of_two, processors, rows_readable
from ..mla_decode.configs import SUM_COLUMNS, SUM_ROWS, SUM_STEP, config_for, splits_for
from ..mla_decode.kernel import sum_kernel
from ..packed_latents import views
from . import kernel

__all__ = ["attend"]


@torch.library.custom_op("deepseek_kernels::sparse_mla", mutates_args=())
def attend(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    out, chosen = _new(q, states, ids, kv_lora_rank, scale), ids.shape[2]
    batch, queries, heads, _ = q.shape
    if not out.numel():
        return out
    if not chosen or not states.numel():
        return out.zero_()
    q, states, ids = rows_readable(q), rows_readable(states), rows_readable(ids)
    operands = _keys(states, kv_lora_rank, q.shape[3] - kv_lora_rank)
    config = config_for(heads, q.dtype, bool(operands["GROUPS"]), capability(q.device))
    blocks, rows = cdiv(heads, config.rows), queries * heads
    splits = splits_for(batch * queries, blocks, chosen, config, processors(q.device))
    parts = log_sums = None
    if splits > 1:
        parts = torch.empty(batch, splits, rows, kv_lora_rank, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(batch, splits, rows, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        kernel.sparse_kernel[(batch * queries * splits * blocks,)](
            q=q,
            **operands,
            ids=ids,
            out=out if parts is None else parts,
            log_sums=log_sums,
            factor=scale * math.log2(math.e),
            **{"heads": heads, "queries": queries, "count": chosen, "splits": splits},
            **{"q_strides": q.stride()[:3], "id_strides": ids.stride()[:2]},
            **{"SLOTS": power_of_two(chosen), "PARTIAL": parts is not None},
            **config.blocks,
            **config.options,
        )
        if parts is not None:
            sum_kernel[batch * cdiv(rows, SUM_ROWS), cdiv(kv_lora_rank, SUM_COLUMNS)](
                *(parts, log_sums, out, rows, splits),
                LATENT=kv_lora_rank,
                ROWS=SUM_ROWS,
                COLUMNS=SUM_COLUMNS,
                SPLITS=power_of_two(splits),
                STEP=SUM_STEP,
                num_warps=4,
            )
    return out


@attend.register_fake
def _new(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], kv_lora_rank)


def _keys(states: Tensor, latent: int, rotated: int) -> dict[str, Any]:
    """Returns the kernel's arguments for the place and the width of keys."""
    batch_stride, token = states.stride(0), states.stride(1)
    packed = states.dtype == torch.uint8
    latents, scales, keys = views(states, latent) if packed else (states, None, states[..., latent:])
    columns = max(16, power_of_two(latent))
    return {
        **{"latents": latents, "scales": scales, "rotated": keys, "batch_stride": batch_stride, "TOKEN": token},
        **{"LATENT": latent, "ROTATED": rotated, "COLUMNS": columns, "EXTRA": max(16, power_of_two(rotated))},
        "UNIT": 16 if batch_stride % 16 == 0 else 4,
        "GROUPS": max(1, columns // GROUP) if packed else 0,
    }
