"""The three GEMMs of a layer in training, each in FP8 or in high precision, as functions with a derivative.

For y = x W^T with x [M, K] and W [N, K] (V3 report, section 3.3):

    fprop   y  = x W^T       x in groups of 1 x 128 along K, W in blocks of 128 x 128
    dgrad   dx = dy W        dy in groups of 1 x 128 along N, the same FP8 values of W, transposed
    wgrad   dW = dy^T x      dy and x in groups of 128 *tokens*, float32 result

A group has to lie along the summed dimension, so x and dy are quantized twice, each time from their high-precision
values: transposed FP8 values would carry the wrong scales (TRAPS E9). Only W's blocks are square and serve both ways.
The FP8 values for wgrad are made in the forward pass, so that the backward pass keeps one byte an element instead of x.

Experts do the same per expert, on rows sorted by expert: row block e belongs to expert e (`ends`, as in
`grouped_gemm`), and no group of tokens spans two experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    quantize_grouped_transposed,
    quantize_rows,
    swiglu_quantize,
)
from deepseek_kernels.common.autograd import join_gradients
from deepseek_kernels.gemm.fp8_gemm import transposed
from deepseek_kernels.quant.fp8_quantize import GROUP

from .operands import Operand, Quantized, as_quantized, flat, input_codes, operand, quantize
from .policy import FP8Precision

__all__ = ["gradients_apart", "product", "swiglu_product"]

# The quantizers make no scale of an amax below 1e-4, which is right for activations. Gradients of a mean over tokens
# are smaller, and those of a gate that hardly opens far smaller again. So gradients are quantized times a power of two,
# which changes no FP8 value from amax 1e-4 x 2^-64 = 5e-24 on, and their scales are divided by it.
_LIFT = 2.0**64


class _Plan(NamedTuple):
    """Facts that hold for a GEMM and for its gradients.

    Attributes:
        dtype: of the output.
        parts: number of stacked matrices in the N rows of a weight, each with a grid of blocks of its own.
        needs_input, needs_weight: which gradients will be asked for.
    """

    precision: FP8Precision
    dtype: torch.dtype
    parts: int
    needs_input: bool
    needs_weight: bool

    @property
    def keeps_codes(self) -> bool:
        """True if the input is kept for wgrad in FP8."""
        return self.needs_weight and self.precision.wgrad == "fp8"


def product(
    x: Tensor,
    weight: Tensor,
    quantized: tuple[Tensor, Tensor] | None,
    precision: FP8Precision,
    ends: Tensor | None = None,
    parts: int = 1,
) -> Tensor:
    """Computes `x @ weight.T`, or with `ends` each row block times its expert's weight.

    Args:
        x: [..., K], or [M, K] with `ends`, in float32, bfloat16 or float16.
        weight: [N, K], or [E, N, K] with `ends`: the master weight, which gets the gradient.
        quantized: FP8 values and scales of `weight` from `quantize_blocks`, if `precision.needs_weight_codes`.
        ends: [E] int64.

    Returns:
        [..., N] in autocast's dtype where it is on, else in x's.
    """
    plan = _plan(x, weight, precision, parts)
    p = plan.precision
    rows, columns = input_codes(x, ends, p.input_scale, rows=p.fprop == "fp8", columns=plan.keeps_codes)
    x_rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    codes = *flat(_pair(quantized)), *flat(rows), *flat(columns)
    if _apart and plan.needs_input and plan.needs_weight:
        own, other = plan._replace(needs_weight=False), plan._replace(needs_input=False)
        out = _Product.apply(x_rows, weight.detach(), *codes, ends, own)
        out = join_gradients(out, _WeightGradient.apply(weight, x_rows.detach(), *flat(columns), ends, other))
    else:
        out = _Product.apply(x_rows, weight, *codes, ends, plan)
    return out.view(*x.shape[:-1], out.shape[-1])


def swiglu_product(
    gate_up: Tensor, weight: Tensor, quantized: tuple[Tensor, Tensor] | None, precision: FP8Precision, ends: Tensor
) -> Tensor:
    """Computes `product` of `silu(gate) * up`, keeping only its input for the backward pass (V3 report, 3.3.3).

    Args:
        gate_up: [M, 2 I], gate columns before up columns.
        weight: [E, N, I]; the other arguments are as for `product`.

    Returns:
        [M, N].
    """
    plan, codes = _plan(gate_up, weight, precision, 1), flat(_pair(quantized))
    if not (_apart and plan.needs_input and plan.needs_weight):
        return _SwigluProduct.apply(gate_up, weight, *codes, ends, plan)
    out = _SwigluProduct.apply(gate_up, weight.detach(), *codes, ends, plan._replace(needs_weight=False))
    other = plan._replace(needs_input=False)
    return join_gradients(out, _SwigluWeightGradient.apply(weight, gate_up.detach(), ends, other))


@contextmanager
def gradients_apart() -> Iterator[None]:
    """Gives products the gradient of their input and that of their weight in a node each (TRAPS S23).

    For zero-bubble pipeline schedules, which ask for one of them at a time: one node computes both each time. Together
    they share what both read of the output's gradient.
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


_apart = False


def _pair(quantized: tuple[Tensor, Tensor] | None) -> Quantized | None:
    return None if quantized is None else Quantized(*quantized)


def _plan(x: Tensor, weight: Tensor, precision: FP8Precision, parts: int) -> _Plan:
    kind, recording = x.device.type, torch.is_grad_enabled()
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return _Plan(precision, dtype, parts, recording and x.requires_grad, recording and weight.requires_grad)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, codes, scale, rows, rows_scale, columns, columns_scale, ends, plan):
        w = operand(codes, scale)
        kept = operand(columns, columns_scale) if plan.keeps_codes else (x if plan.needs_weight else None)
        _save(ctx, kept, weight, w, ends, plan)
        ctx.x_dtype = x.dtype
        return _output(x, operand(rows, rows_scale), weight, w, ends, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, x_scale, w, w_scale, ends = ctx.saved_tensors
        grad_x, grad_weight = _gradients(ctx, grad, operand(x, x_scale), operand(w, w_scale), ends, ctx.x_dtype)
        return grad_x, grad_weight, *(None,) * 8


class _SwigluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, codes, scale, ends, plan):
        p, w, rows, hidden = plan.precision, operand(codes, scale), None, None
        if p.fprop == "fp8":
            rows = Quantized(*swiglu_quantize(gate_up, p.input_scale))
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        kept: Operand = gate_up
        if p.swiglu_cache == "fp8" and (plan.needs_input or plan.needs_weight):
            kept = Quantized(*quantize_rows(gate_up))
        _save(ctx, kept, weight, w, ends, plan)
        ctx.x_dtype = gate_up.dtype
        return _output(hidden, rows, weight, w, ends, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, kept_scale, w, w_scale, ends = ctx.saved_tensors
        p, dtype = ctx.plan.precision, ctx.x_dtype
        if kept_scale is not None:
            kept = dequantize_blocks(kept, kept_scale, (1, GROUP), torch.float32)
        gate, up = kept.float().chunk(2, dim=-1)
        gate_sigmoid = gate.sigmoid()
        silu = gate * gate_sigmoid
        x: Operand | None = None
        if ctx.plan.needs_weight:
            hidden = silu * up  # in float32, as it was before the forward pass quantized it
            x = hidden
            if p.wgrad == "fp8":
                x = Quantized(*quantize_grouped_transposed(hidden, ends, p.input_scale))
        grad_hidden, grad_weight = _gradients(ctx, grad, x, operand(w, w_scale), ends, torch.float32)
        if grad_hidden is None:
            return None, grad_weight, None, None, None, None
        grad_gate = grad_hidden * up * (gate_sigmoid + silu * (1 - gate_sigmoid))
        grad_gate_up = torch.cat((grad_gate, grad_hidden * silu), dim=-1).to(dtype)
        return grad_gate_up, grad_weight, None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """Stands for a product with a tensor of its shape that takes no memory; its gradient is the weight's."""

    @staticmethod
    def forward(ctx, weight, x, columns, columns_scale, ends, plan):
        kept = operand(columns, columns_scale) if plan.keeps_codes else x
        _save(ctx, kept, weight, None, ends, plan)
        ctx.x_dtype = x.dtype
        return x.new_zeros((), dtype=plan.dtype).expand(x.shape[0], weight.shape[-2])

    @staticmethod
    def backward(ctx, grad):
        return _Product.backward(ctx, grad)[1], *(None,) * 5


class _SwigluWeightGradient(torch.autograd.Function):
    """As `_WeightGradient`, from the input of SwiGLU."""

    @staticmethod
    def forward(ctx, weight, gate_up, ends, plan):
        kept = Quantized(*quantize_rows(gate_up)) if plan.precision.swiglu_cache == "fp8" else gate_up
        _save(ctx, kept, weight, None, ends, plan)
        ctx.x_dtype = gate_up.dtype
        return gate_up.new_zeros((), dtype=plan.dtype).expand(gate_up.shape[0], weight.shape[-2])

    @staticmethod
    def backward(ctx, grad):
        return _SwigluProduct.backward(ctx, grad)[1], None, None, None


def _save(ctx, kept: Operand | None, weight: Tensor, w: Operand | None, ends: Tensor | None, plan: _Plan) -> None:
    used = (w if plan.precision.dgrad == "fp8" else weight) if plan.needs_input else None
    ctx.save_for_backward(*flat(kept), *flat(used), ends)
    ctx.plan, ctx.weight_dtype, ctx.weight_shape = plan, weight.dtype, weight.shape


def _output(
    x: Tensor | None, rows: Operand | None, weight: Tensor, w: Operand | None, ends: Tensor | None, plan: _Plan
) -> Tensor:
    """Computes fprop."""
    if plan.precision.fprop == "high":
        assert x is not None
        return _high_gemm(x.to(plan.dtype), weight.to(plan.dtype), ends)
    if ends is None:
        return fp8_gemm(*as_quantized(rows), *as_quantized(w), plan.dtype)
    return fp8_grouped_gemm(*as_quantized(rows), *as_quantized(w), ends, plan.dtype, plan.parts)


def _gradients(
    ctx, grad: Tensor, x: Operand | None, w: Operand | None, ends: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Computes dgrad in `dtype` and wgrad in the weight's; None for what was not asked for."""
    plan, p = ctx.plan, ctx.plan.precision
    dgrad, wgrad = isinstance(w, Quantized), isinstance(x, Quantized)
    # Experts quantize the rows of their parts themselves.
    lifted = _lift(grad) if dgrad or wgrad else grad
    rows, columns = quantize(lifted, ends, p.grad_scale, rows=dgrad and ends is None, columns=wgrad)
    grad_x = grad_weight = None
    if isinstance(w, Quantized):
        if ends is None:
            grad_x = fp8_gemm(*_lowered(rows), transposed(w.codes), w.scale.T, dtype)
        else:
            grad_x = _grouped_dgrad(lifted, w, ends, p.grad_scale, dtype, plan.parts)
    elif w is not None:
        grad_x = _high_gemm(grad, w.to(grad.dtype).transpose(-2, -1), ends).to(dtype)
    if isinstance(x, Quantized):
        if ends is None:
            grad_weight = fp8_gemm(*_lowered(columns), *x, torch.float32)
        else:
            grad_weight = fp8_grouped_wgrad(*_lowered(columns), *x, ends)
    elif x is not None and plan.needs_weight:
        grad_weight = _high_wgrad(grad, x.to(grad.dtype), ends, ctx.weight_shape)
    return grad_x, None if grad_weight is None else grad_weight.to(ctx.weight_dtype)


def _lift(grad: Tensor) -> Tensor:
    return (grad.float() if grad.dtype == torch.float16 else grad) * _LIFT


def _lowered(lifted: Quantized | None) -> Quantized:
    """Gives a lifted gradient the scales of the gradient itself; in place, which keeps their layout."""
    codes, scale = as_quantized(lifted)
    return Quantized(codes, scale.mul_(1 / _LIFT))


def _grouped_dgrad(
    grad: Tensor, w: Quantized, ends: Tensor, scale_format: str | None, dtype: torch.dtype, parts: int
) -> Tensor:
    """Multiplies [P, N], lifted, by each expert's [N, K].

    One part of the N rows after another where they do not end at a block's edge: a group of 128 of the gradient would
    straddle two blocks of the weight.
    """
    codes, scale = w
    pieces = 1 if (codes.shape[1] // parts) % GROUP == 0 else parts
    outputs = []
    for piece, piece_codes, piece_scale in zip(
        grad.chunk(pieces, -1), codes.chunk(pieces, 1), scale.chunk(pieces, 1), strict=True
    ):
        # As bytes: not every device copies FP8 tensors.
        flipped = piece_codes.view(torch.uint8).transpose(1, 2).contiguous().view(codes.dtype)
        rows = _lowered(Quantized(*quantize_rows(piece, scale_format)))
        wide = dtype if pieces == 1 else torch.float32
        outputs.append(fp8_grouped_gemm(*rows, flipped, piece_scale.transpose(1, 2), ends, wide))
    total = outputs[0]
    for out in outputs[1:]:
        total = total + out
    return total.to(dtype)


def _high_gemm(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
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
