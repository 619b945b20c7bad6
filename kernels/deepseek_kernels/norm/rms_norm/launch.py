"""Launches the kernels of `rms_norm`: custom operators, opaque to torch.compile, and their derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.fp8 import GROUP, empty_codes, empty_scales
from ...common.host import cdiv, rows_readable
from . import backward, kernel
from .configs import BACKWARD_PROGRAMS, OPTIONS, backward_stages, backward_tile, forward_tile

__all__ = ["quantize", "rms_norm"]


@torch.library.custom_op("deepseek_kernels::rms_norm", mutates_args=())
def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the norm, the sum that was normed (empty without a residual), and 1 / sqrt(mean + eps) of each row."""
    out, total, rstd = _new_normed(x, residual, weight, eps)
    if x.numel():
        _forward(x, residual, weight, out.view(-1, x.shape[-1]), total, rstd, rstd, eps)
    return out, total, rstd


@rms_norm.register_fake
def _new_normed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = _new_total(x, residual)
    dtype = torch.promote_types(x.dtype if residual is None else total.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("deepseek_kernels::rms_norm_quantize", mutates_args=())
def quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns FP8 values, scales, and the sum that was normed (empty without a residual)."""
    codes, scales, total = _new_quantized(x, residual, weight, eps, power_of_two)
    if x.numel():
        _forward(x, residual, weight, codes, total, scales, scales, eps, True, power_of_two)
    return codes, scales, total


@quantize.register_fake
def _new_quantized(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    codes, scales = empty_codes(rows, columns, x.device), empty_scales(rows, cdiv(columns, GROUP), x.device)
    return codes, scales, _new_total(x, residual)


def _new_total(x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return x.new_empty(0)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _rows(x: Tensor) -> Tensor:
    """Views [..., H] as [M, H]; copies only if its rows are not equally far apart or not each in one piece."""
    return rows_readable(x.reshape(-1, x.shape[-1]))


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    rstd: Tensor,
    scales: Tensor,
    eps: float,
    quantized: bool = False,
    power_of_two: bool = False,
) -> None:
    added, x = residual is not None, _rows(x)
    more, total = (_rows(residual), total) if residual is not None else (x, x)
    tile, (rows, columns) = forward_tile(*x.shape), x.shape
    strides = (x.stride(0), more.stride(0), out.stride(0), scales.stride(1) if quantized else 0)
    with torch.cuda.device_of(x):
        kernel.forward_kernel[(cdiv(rows, tile.rows),)](
            *(x, more, weight.contiguous(), out, total, rstd, scales, rows, columns, strides, eps, 1.0 / columns),
            ADD=added,
            QUANTIZE=quantized,
            POWER_OF_TWO=power_of_two,
            **tile.options,
            **OPTIONS,
        )


@torch.library.custom_op("deepseek_kernels::rms_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the sum that was normed, and of the weight (empty if it is not needed)."""
    grad_x, grad_weight = _new_gradients(grad, grad_total, total, weight, rstd, need_weight)
    if not total.numel():
        return grad_x, grad_weight.zero_()
    grad, total, (rows, columns) = _rows(grad), _rows(total), _rows(total).shape
    more = grad if grad_total is None else _rows(grad_total)
    tile = backward_tile(columns)
    loaded = (grad, total) if grad_total is None else (grad, total, more)
    # Whole tiles for each program; their number depends on the shape alone, and so does the order of the sums.
    rows_each = cdiv(cdiv(rows, tile.rows), BACKWARD_PROGRAMS) * tile.rows
    programs = cdiv(rows, rows_each)
    partials = rstd.new_empty(programs if need_weight else 0, columns)
    arguments = (grad, more, total, weight.contiguous(), rstd, grad_x, partials, rows, columns, rows_each)
    with torch.cuda.device_of(total):
        backward.backward_kernel[(programs,)](
            *(*arguments, (grad.stride(0), more.stride(0), total.stride(0)), 1.0 / columns),
            ADD=grad_total is not None,
            NEED_WEIGHT=need_weight,
            STAGES=backward_stages(tile, sum(one.element_size() for one in loaded)),
            **tile.options,
            **OPTIONS,
        )
    return grad_x, partials.sum(0).to(weight.dtype) if need_weight else grad_weight


@_backward.register_fake
def _new_gradients(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape if need_weight else 0)


def _save(ctx, inputs, output) -> None:
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.added, ctx.dtypes = residual is not None, (x.dtype, None if residual is None else residual.dtype)
    ctx.set_materialize_grads(False)  # zeros in place of an absent gradient would be read for nothing
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total if ctx.added else x, weight, rstd)


def _differentiate(ctx, grad: Tensor | None, grad_total: Tensor | None, _) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    need_weight, grad_weight = ctx.needs_input_grad[2] and grad is not None, None
    grad_x = grad_total if ctx.added else None
    if grad is not None:
        grad_x, grad_weight = _backward(grad, grad_x, total, weight, rstd, need_weight)
    narrow = [None if grad_x is None or dtype is None else grad_x.to(dtype) for dtype in ctx.dtypes]
    return *narrow, grad_weight if need_weight else None, None


rms_norm.register_autograd(_differentiate, setup_context=_save)
