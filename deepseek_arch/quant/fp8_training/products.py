"""The three products of a layer, each in FP8 or in high precision, as functions with a derivative.

For y = x W^T with x [M, K] and W [N, K] (V3 report, section 3.3):

    fprop   y  = x W^T       x in groups of 1 x 128 along K, W in blocks of 128 x 128
    dgrad   dx = dy W        dy in groups of 1 x 128 along N, the same codes of W, transposed
    wgrad   dW = dy^T x      dy and x in groups of 128 *tokens*, float32 result

A group has to lie along what is summed over, so x and dy are quantized twice, each time from their high-precision
values: transposed codes would carry the wrong scales (TRAPS E9). Only W's blocks are square and serve both ways. The
codes for wgrad are made in the forward pass, so that the backward pass keeps one byte an element instead of x itself.

Experts do the same per expert, on rows sorted by expert: row block e belongs to expert e (`ends`, as in
`grouped_gemm`), and no group of tokens spans two experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deepseek_kernels import (
    dense_gemm,
    dequantize_blocks,
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_grouped_wgrad,
    grouped_gemm,
    quantize_both,
    quantize_grouped_transposed,
    quantize_rows,
    quantize_transposed,
    swiglu_quantize,
)
from deepseek_kernels.gemm.fp8_gemm import transposed
from deepseek_kernels.quant.fp8_quantize import GROUP

from .policy import FP8Precision

__all__ = ["product", "swiglu_product"]

Quantized = tuple[Tensor | None, Tensor | None]  # codes and scales, or neither
NONE: Quantized = (None, None)

# The quantizers make no scale of an amax below 1e-4, which is right for activations. Gradients of a mean over tokens
# are smaller, and those of a gate that hardly opens far smaller again. So gradients are quantized times a power of two,
# which changes no code from amax 1e-4 x 2^-64 = 5e-24 on, and their scales are divided by it.
_LIFT = 2.0**64


class _Plan(NamedTuple):
    """What does not change between a product and its gradients.

    Attributes:
        dtype: of the output.
        parts: the N rows of a weight are so many stacked matrices, each with a grid of blocks of its own.
        needs_input, needs_weight: which gradients will be asked for.
    """

    precision: FP8Precision
    dtype: torch.dtype
    parts: int
    needs_input: bool
    needs_weight: bool


def product(
    x: Tensor, weight: Tensor, quantized: Quantized, precision: FP8Precision, ends: Tensor | None = None, parts: int = 1
) -> Tensor:
    """`x @ weight.T`, or with `ends` each row block times its expert's weight.

    Args:
        x: [M, K] float32, bfloat16 or float16.
        weight: [N, K], or [E, N, K] with `ends`: the master weight, which gets the gradient.
        quantized: codes and scales of `weight` from `quantize_blocks`, if `precision.needs_weight_codes`.
        ends: [E] int64.

    Returns:
        [M, N] in autocast's dtype where it is on, else in x's.
    """
    return _Product.apply(x, weight, *quantized, ends, _plan(x, weight, precision, parts))


def swiglu_product(
    gate_up: Tensor, weight: Tensor, quantized: Quantized, precision: FP8Precision, ends: Tensor
) -> Tensor:
    """`product` of `silu(gate) * up`, of which only the input is kept for the backward pass (V3 report, 3.3.3).

    Args:
        gate_up: [M, 2 I], gate columns before up columns.
        weight: [E, N, I]; the other arguments are as for `product`.

    Returns:
        [M, N].
    """
    return _SwigluProduct.apply(gate_up, weight, *quantized, ends, _plan(gate_up, weight, precision, 1))


def _plan(x: Tensor, weight: Tensor, precision: FP8Precision, parts: int) -> _Plan:
    kind, recording = x.device.type, torch.is_grad_enabled()
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return _Plan(precision, dtype, parts, recording and x.requires_grad, recording and weight.requires_grad)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, codes, scale, ends, plan):
        p = plan.precision
        keeps_codes = plan.needs_weight and p.wgrad == "fp8"
        rows, columns = _quantize(x, ends, p.input_scale, rows=p.fprop == "fp8", columns=keeps_codes)
        kept: Quantized = columns if keeps_codes else (x if plan.needs_weight else None, None)
        _save(ctx, kept, weight, (codes, scale), ends, plan)
        ctx.x_dtype = x.dtype
        return _output(x, rows, weight, (codes, scale), ends, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, x_scale, w, w_scale, ends = ctx.saved_tensors
        grad_x, grad_weight = _gradients(ctx, grad, (x, x_scale), (w, w_scale), ends, ctx.x_dtype)
        return grad_x, grad_weight, None, None, None, None


class _SwigluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, codes, scale, ends, plan):
        p, rows, hidden = plan.precision, NONE, None
        if p.fprop == "fp8":
            rows = swiglu_quantize(gate_up, p.input_scale)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        kept: Quantized = (gate_up, None)
        if p.swiglu_cache == "fp8" and (plan.needs_input or plan.needs_weight):
            kept = quantize_rows(gate_up)
        _save(ctx, kept, weight, (codes, scale), ends, plan)
        ctx.x_dtype = gate_up.dtype
        return _output(hidden, rows, weight, (codes, scale), ends, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, kept_scale, w, w_scale, ends = ctx.saved_tensors
        p, dtype = ctx.plan.precision, ctx.x_dtype
        if kept_scale is not None:
            kept = dequantize_blocks(kept, kept_scale, (1, GROUP), torch.float32)
        gate, up = kept.float().chunk(2, dim=-1)
        chance = gate.sigmoid()
        silu = gate * chance
        x: Quantized = NONE
        if ctx.plan.needs_weight:
            hidden = silu * up  # in float32, as it was before the forward pass quantized it
            x = quantize_grouped_transposed(hidden, ends, p.input_scale) if p.wgrad == "fp8" else (hidden, None)
        grad_hidden, grad_weight = _gradients(ctx, grad, x, (w, w_scale), ends, torch.float32)
        if grad_hidden is None:
            return None, grad_weight, None, None, None, None
        grad_gate = grad_hidden * up * (chance + silu * (1 - chance))
        grad_gate_up = torch.cat((grad_gate, grad_hidden * silu), dim=-1).to(dtype)
        return grad_gate_up, grad_weight, None, None, None, None


def _save(ctx, kept: Quantized, weight: Tensor, quantized: Quantized, ends: Tensor | None, plan: _Plan) -> None:
    w: Quantized = NONE
    if plan.needs_input:
        w = quantized if plan.precision.dgrad == "fp8" else (weight, None)
    ctx.save_for_backward(*kept, *w, ends)
    ctx.plan, ctx.weight_dtype, ctx.weight_shape = plan, weight.dtype, weight.shape


def _output(
    x: Tensor | None, rows: Quantized, weight: Tensor, quantized: Quantized, ends: Tensor | None, plan: _Plan
) -> Tensor:
    """fprop."""
    if plan.precision.fprop == "high":
        return _high_product(x.to(plan.dtype), weight.to(plan.dtype), ends)
    if ends is None:
        return fp8_gemm(*rows, *quantized, plan.dtype)
    return fp8_grouped_gemm(*rows, *quantized, ends, plan.dtype, plan.parts)


def _gradients(
    ctx, grad: Tensor, x: Quantized, w: Quantized, ends: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """dgrad in `dtype` and wgrad in the weight's; None for what was not asked for."""
    plan, p = ctx.plan, ctx.plan.precision
    dgrad, wgrad = plan.needs_input and p.dgrad == "fp8", plan.needs_weight and p.wgrad == "fp8"
    # Experts quantize the rows of their parts themselves.
    lifted = _lift(grad) if dgrad or wgrad else grad
    rows, columns = _quantize(lifted, ends, p.grad_scale, rows=dgrad and ends is None, columns=wgrad)
    rows, columns = _settle(rows), _settle(columns)
    grad_x = grad_weight = None
    if dgrad and ends is None:
        codes, scale = w
        grad_x = fp8_gemm(*rows, transposed(codes), scale.T, dtype)
    elif dgrad:
        grad_x = _grouped_dgrad(lifted, w, ends, p.grad_scale, dtype, plan.parts)
    elif plan.needs_input:
        grad_x = _high_product(grad, w[0].to(grad.dtype).transpose(-2, -1), ends).to(dtype)
    if wgrad and ends is None:
        grad_weight = fp8_gemm(*columns, *x, torch.float32)
    elif wgrad:
        grad_weight = fp8_grouped_wgrad(*columns, *x, ends)
    elif plan.needs_weight:
        grad_weight = _high_wgrad(grad, x[0].to(grad.dtype), ends, ctx.weight_shape)
    return grad_x, None if grad_weight is None else grad_weight.to(ctx.weight_dtype)


def _quantize(
    x: Tensor, ends: Tensor | None, scale_format: str | None, *, rows: bool, columns: bool
) -> tuple[Quantized, Quantized]:
    """`x` in groups along its rows, and in groups of tokens."""
    if ends is None and rows and columns:
        codes, scale, codes_t, scale_t = quantize_both(x, scale_format)
        return (codes, scale), (codes_t, scale_t)
    along_rows = quantize_rows(x, scale_format) if rows else NONE
    if not columns:
        return along_rows, NONE
    if ends is None:
        return along_rows, quantize_transposed(x, scale_format)
    return along_rows, quantize_grouped_transposed(x, ends, scale_format)


def _lift(grad: Tensor) -> Tensor:
    return (grad.float() if grad.dtype == torch.float16 else grad) * _LIFT


def _settle(lifted: Quantized) -> Quantized:
    """Codes of a lifted gradient with the scales of the gradient itself; in place, which keeps their layout."""
    codes, scale = lifted
    return codes, None if scale is None else scale.mul_(1 / _LIFT)


def _grouped_dgrad(
    grad: Tensor, w: Quantized, ends: Tensor, scale_format: str | None, dtype: torch.dtype, parts: int
) -> Tensor:
    """[P, N], lifted, times each expert's [N, K].

    One part of the N rows after another where they do not end at a block's edge: a group of 128 of the gradient would
    straddle two blocks of the weight.
    """
    codes, scale = w
    pieces = 1 if (codes.shape[1] // parts) % GROUP == 0 else parts
    total: Tensor | None = None
    own = zip(grad.chunk(pieces, -1), codes.chunk(pieces, 1), scale.chunk(pieces, 1), strict=True)
    for piece, piece_codes, piece_scale in own:
        # As bytes: not every device copies FP8 tensors.
        flipped = piece_codes.view(torch.uint8).transpose(1, 2).contiguous().view(codes.dtype)
        rows = _settle(quantize_rows(piece, scale_format))
        wide = dtype if pieces == 1 else torch.float32
        out = fp8_grouped_gemm(*rows, flipped, piece_scale.transpose(1, 2), ends, wide)
        total = out if total is None else total + out
    return total.to(dtype)


def _high_product(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    return dense_gemm(x, weight) if ends is None else grouped_gemm(x, weight.contiguous(), ends)


def _high_wgrad(grad: Tensor, x: Tensor, ends: Tensor | None, shape: torch.Size) -> Tensor:
    if ends is None:
        return dense_gemm(grad.T, x.T)
    out = grad.new_zeros(shape)  # an expert without rows has a gradient, and it is zero
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[expert] = dense_gemm(grad[start:end].T, x[start:end].T)
        start = end
    return out
