"""Launches `latent_write`: a custom operator, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.host import cdiv, rows_readable
from ..packed_latents import views
from . import kernel
from .configs import tile_for

__all__ = ["write"]


@torch.library.custom_op("deepseek_kernels::latent_write", mutates_args={"buffer"})
def write(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    if not kv.numel() or not buffer.numel():
        return
    (batch, tokens, width), latent = kv.shape, len(weight)
    kv, cos, sin = rows_readable(kv), rows_readable(cos), rows_readable(sin)
    fp8 = buffer.dtype == torch.uint8
    parts = views(buffer, latent) if fp8 else (buffer, buffer, buffer[..., latent:])
    limit = buffer.shape[1] * (buffer.shape[0] if paged else 1)
    tile = tile_for(batch * tokens, latent, width - latent)
    with torch.cuda.device_of(kv):
        kernel.write_kernel[(cdiv(batch * tokens, tile.rows),)](
            *(kv, weight.contiguous(), cos, sin, slots, *parts),
            *(batch * tokens, tokens, latent, (width - latent) // 2, limit, buffer.shape[1]),
            *(kv.stride()[:2], _token_strides(cos), _token_strides(sin), _token_strides(slots), buffer.stride()[:2]),
            *(eps, 1.0 / latent),
            PAGED=paged,
            FP8=fp8,
            **tile.blocks,
            **tile.options,
        )


@write.register_fake
def _write_nothing(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    return None


def _token_strides(x: Tensor) -> tuple[int, int]:
    """Returns the strides of rows of the batch (0 if all of them share one) and of tokens."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)
