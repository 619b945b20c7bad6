"""Launches the kernels of `moe_permute`: custom operators, opaque to torch.compile, and their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.host import cdiv, power_of_two, rows_readable
from . import kernel
from .configs import BYTE_COLUMNS, COLUMNS, OPTIONS, STEP, STEPS, table_rows

__all__ = ["combine", "permute", "sort_by_expert", "spread", "unpermute"]


@torch.library.custom_op("deepseek_kernels::moe_sort_by_expert", mutates_args=())
def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse, ends = _new_sorted(expert_ids, num_experts)
    pairs = expert_ids.numel()
    if not pairs:
        return order, inverse, ends.zero_()
    expert_ids = expert_ids.contiguous()
    blocks, bins = cdiv(pairs, STEP * STEPS), power_of_two(num_experts + 2)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=expert_ids.device)
    constants = {"STEP": STEP, "STEPS": STEPS, "EXPERTS": bins, "num_warps": 4}
    with torch.cuda.device_of(expert_ids):
        kernel.count_kernel[(blocks,)](expert_ids, counts, pairs, num_experts, **constants)
        arguments = (expert_ids, counts, order, inverse, ends, pairs, num_experts, blocks)
        kernel.place_kernel[(blocks,)](*arguments, ROWS=table_rows(bins), **constants)
    return order, inverse, ends


@sort_by_expert.register_fake
def _new_sorted(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    new = expert_ids.new_empty
    return (
        new(expert_ids.numel(), dtype=torch.int64),
        new(expert_ids.shape, dtype=torch.int64),
        new(num_experts, dtype=torch.int64),
    )


@torch.library.custom_op("deepseek_kernels::moe_spread", mutates_args=())
def spread(x: Tensor, inverse: Tensor) -> Tensor:
    """Copies each token's row to the sorted rows that `inverse` gives."""
    out, x = _new_spread(x, inverse), rows_readable(x)
    if out.numel():
        arguments = (x, inverse.contiguous(), out, inverse.shape[1], x.shape[1], x.stride(0))
        columns = COLUMNS if x.element_size() > 1 else BYTE_COLUMNS
        with torch.cuda.device_of(x):
            kernel.spread_kernel[x.shape[0], cdiv(x.shape[1], columns)](*arguments, COLUMNS=columns, **OPTIONS)
    return out


@spread.register_fake
def _new_spread(x: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(inverse.numel(), x.shape[1])


@torch.library.custom_op("deepseek_kernels::moe_combine", mutates_args=())
def combine(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """Sums each token's rows of y, weighted or not."""
    out, y = _new_combined(y, weights, inverse), rows_readable(y)
    if out.numel():
        plain = y if weights is None else weights.contiguous()
        arguments = (y, plain, inverse.contiguous(), out, inverse.shape[1], y.shape[1], y.stride(0))
        with torch.cuda.device_of(y):
            kernel.combine_kernel[out.shape[0], cdiv(out.shape[1], COLUMNS)](
                *arguments, COLUMNS=COLUMNS, WEIGHTED=weights is not None, **OPTIONS
            )
    return out


@combine.register_fake
def _new_combined(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    return y.new_empty(inverse.shape[0], y.shape[1])


@torch.library.custom_op("deepseek_kernels::moe_combine_backward", mutates_args=())
def _combine_backward(
    grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor, need_y: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = _new_gradients(grad, y, weights, inverse, need_y, need_weights)
    grad, y, choices = rows_readable(grad), rows_readable(y), inverse.shape[1]
    if inverse.numel():
        arguments = (grad, y, weights.contiguous(), inverse.contiguous(), grad_y, grad_weights, choices, y.shape[1])
        needs = {"NEED_Y": need_y, "NEED_WEIGHTS": need_weights}
        with torch.cuda.device_of(y):
            kernel.combine_backward_kernel[(grad.shape[0],)](
                *(*arguments, grad.stride(0), y.stride(0)), COLUMNS=COLUMNS, **needs, **OPTIONS
            )
    return grad_y, grad_weights


@_combine_backward.register_fake
def _new_gradients(
    grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor, need_y: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape if need_y else 0), weights.new_empty(weights.shape if need_weights else 0)


def _save_inverse(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_spread(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (inverse,) = ctx.saved_tensors
    return combine(grad, None, inverse), None


def _save_all(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_combine(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    y, weights, inverse = ctx.saved_tensors
    if weights is None:  # only in the derivative of a derivative
        return spread(grad, inverse), None, None
    need_y, need_weights, _ = ctx.needs_input_grad
    grad_y, grad_weights = _combine_backward(grad, y, weights, inverse, need_y, need_weights)
    return grad_y if need_y else None, grad_weights if need_weights else None, None


spread.register_autograd(_differentiate_spread, setup_context=_save_inverse)
combine.register_autograd(_differentiate_combine, setup_context=_save_all)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return spread(x, inverse)


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return combine(y, weights, inverse)
