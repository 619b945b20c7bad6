"""Launches the rotation: custom operators, opaque to torch.compile, and the derivative, which rotates back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.host import cdiv, rows_readable
from . import kernel
from .configs import tile_for

__all__ = ["rope", "rope_"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backward: bool, copy: bool) -> None:
    if not x.numel():
        return
    if x.ndim == 3:
        x, out = x[:, :, None], out[:, :, None]
    (batch, length, heads, width), pairs = x.shape, cos.shape[2]
    cos, sin = rows_readable(cos), rows_readable(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    tile, offset = tile_for(batch * length, heads, pairs), width - 2 * pairs
    angle_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    with torch.cuda.device_of(x):
        kernel.rotate_kernel[cdiv(batch * length, tile["TOKENS"]), cdiv(heads, tile["HEADS"])](
            *(x, cos, sin, out, batch * length, length, heads, offset),
            *(x.stride()[:3], out.stride()[:3], angle_strides),
            PAIRS=pairs,
            BACKWARD=backward,
            COPY=copy and offset > 0,
            **tile,
            num_warps=4,
            enable_fp_fusion=False,  # the reference has none
        )


@torch.library.custom_op("deepseek_kernels::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    out = _new(x, cos, sin, backward)
    _rotate(rows_readable(x), cos, sin, out, backward, copy=True)
    return out


@_rope.register_fake
def _new(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.backward = inputs[3]


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _rope(grad, *ctx.saved_tensors, not ctx.backward), None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rope(x, cos, sin, False)


@torch.library.custom_op("deepseek_kernels::rope_", mutates_args=("x",))
def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.stride(-1) == 1:
        _rotate(x, cos, sin, x, backward=False, copy=False)
        return
    rotary = x[..., x.shape[-1] - 2 * cos.shape[-1] :]
    packed = rotary.contiguous()
    _rotate(packed, cos, sin, packed, backward=False, copy=False)
    rotary.copy_(packed)


@rope_.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None
