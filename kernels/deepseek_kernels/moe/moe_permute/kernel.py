"""Sorting by expert, and both movements of rows, in Triton; no atomics on floats, no waiting for the device.

Both movements go token by token: a program reads a token's row once and writes its K sorted rows, or reads those and
writes their sum. By sorted row, the token's row would be read K times, from memory and not from a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 64  # pairs ranked against each other at a time
_STEPS = 16
_COLUMNS = 1024  # of a row, by 128 threads: 16 bytes of bfloat16 each
_BYTES = 2048


@triton.jit
def _ids_of(expert_ids, pair, pairs, experts, EXPERTS: tl.constexpr):
    """The experts of these pairs; the last number of all beyond the last pair."""
    ids = tl.load(expert_ids + pair, pair < pairs, other=0)
    ids = tl.where((ids >= 0) & (ids < experts), ids, experts)  # whatever they hold, they index no other memory
    return tl.where(pair < pairs, ids, EXPERTS - 1).to(tl.int32)


@triton.jit
def _count_kernel(expert_ids, counts, pairs, experts, STEP: tl.constexpr, STEPS: tl.constexpr, EXPERTS: tl.constexpr):
    """How many pairs each expert has in each block of STEP * STEPS pairs: counts [blocks, EXPERTS]."""
    total, first = tl.zeros((EXPERTS,), tl.int32), tl.program_id(0).to(tl.int64) * STEP * STEPS
    for start in tl.range(first, tl.minimum(first + STEP * STEPS, pairs), STEP):
        pair = start + tl.arange(0, STEP)
        total += tl.histogram(_ids_of(expert_ids, pair, pairs, experts, EXPERTS), EXPERTS)
    tl.store(counts + tl.program_id(0).to(tl.int64) * EXPERTS + tl.arange(0, EXPERTS), total)


@triton.jit
def _place_kernel(
    expert_ids,
    counts,
    order,
    inverse,
    ends,
    pairs,
    experts,
    blocks,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A pair's place: pairs of smaller experts, pairs of its own in earlier blocks, and those earlier in its block."""
    expert, block = tl.arange(0, EXPERTS), tl.program_id(0)
    total, before = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
    for first in tl.range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        at = counts + row[:, None].to(tl.int64) * EXPERTS + expert[None, :]
        tile = tl.load(at, (row < blocks)[:, None], other=0)
        total += tl.sum(tile, 0)
        before += tl.sum(tl.where((row < block)[:, None], tile, 0), 0)
    through = tl.cumsum(total)
    if block == 0:
        tl.store(ends + expert, through.to(tl.int64), expert < experts)
    place = through - total + before
    at, first = tl.arange(0, STEP), block.to(tl.int64) * STEP * STEPS
    for start in tl.range(first, tl.minimum(first + STEP * STEPS, pairs), STEP):
        pair = start + at
        ids = _ids_of(expert_ids, pair, pairs, experts, EXPERTS)
        earlier = (ids[:, None] == ids[None, :]) & (at[None, :] < at[:, None])
        row = (tl.gather(place, ids, 0) + tl.sum(earlier.to(tl.int32), 1)).to(tl.int64)
        tl.store(order + row, pair, pair < pairs)
        tl.store(inverse + pair, row, pair < pairs)
        place += tl.histogram(ids, EXPERTS)


@triton.jit
def _spread_kernel(x, inverse, out, choices, columns, x_stride, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    values = tl.load(x + token * x_stride + column, inside)
    for choice in tl.range(choices):
        row = tl.load(inverse + token * choices + choice)
        tl.store(out + row * columns + column, values, inside)


@triton.jit
def _combine_kernel(
    y, weights, inverse, out, choices, columns, y_stride, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr
):
    """One choice after the other, product and sum each rounded to float32, as the reference has it."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.range(choices, loop_unroll_factor=8):
        row = tl.load(inverse + token * choices + choice)
        values = tl.load(y + row * y_stride + column, inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + token * choices + choice).to(tl.float32)
        total += values
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), inside)


@triton.jit
def _combine_backward_kernel(
    grad,
    y,
    weights,
    inverse,
    grad_y,
    grad_weights,
    choices,
    columns,
    grad_stride,
    y_stride,
    COLUMNS: tl.constexpr,
    NEED_Y: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    for choice in tl.range(choices):
        row = tl.load(inverse + token * choices + choice)
        weight = tl.load(weights + token * choices + choice).to(tl.float32)
        dots = tl.zeros((COLUMNS,), tl.float32)
        for start in tl.range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < columns
            # Read from memory for the first choice; later ones find it in a cache.
            values = tl.load(grad + token * grad_stride + column, inside, other=0.0).to(tl.float32)
            if NEED_WEIGHTS:
                dots += values * tl.load(y + row * y_stride + column, inside, other=0.0).to(tl.float32)
            if NEED_Y:
                tl.store(grad_y + row * columns + column, (values * weight).to(grad_y.dtype.element_ty), inside)
        if NEED_WEIGHTS:
            total = tl.sum(dots, 0).to(grad_weights.dtype.element_ty)
            tl.store(grad_weights + token * choices + choice, total)


def _rows_readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(tokens: int, columns: int, block: int = _COLUMNS) -> tuple[int, int]:
    return tokens, triton.cdiv(columns, block)


# No fusion of products into sums: the reference has none, and these kernels wait for memory.
_OPTIONS = {"COLUMNS": _COLUMNS, "num_warps": 4, "enable_fp_fusion": False}


@torch.library.custom_op("deepseek_kernels::moe_sort_by_expert", mutates_args=())
def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse, ends = _new_sorted(expert_ids, num_experts)
    pairs = expert_ids.numel()
    if not pairs:
        return order, inverse, ends.zero_()
    expert_ids = expert_ids.contiguous()
    blocks, bins = triton.cdiv(pairs, _STEP * _STEPS), triton.next_power_of_2(num_experts + 2)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=expert_ids.device)
    constants = {"STEP": _STEP, "STEPS": _STEPS, "EXPERTS": bins, "num_warps": 4}
    with torch.cuda.device_of(expert_ids):
        _count_kernel[(blocks,)](expert_ids, counts, pairs, num_experts, **constants)
        arguments = (expert_ids, counts, order, inverse, ends, pairs, num_experts, blocks)
        _place_kernel[(blocks,)](*arguments, ROWS=_table_rows(bins), **constants)
    return order, inverse, ends


@sort_by_expert.register_fake
def _new_sorted(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    new = expert_ids.new_empty
    return (
        new(expert_ids.numel(), dtype=torch.int64),
        new(expert_ids.shape, dtype=torch.int64),
        new(num_experts, dtype=torch.int64),
    )


def _table_rows(bins: int) -> int:
    """Rows of the table of counts that are read at a time: 32 numbers a thread."""
    return max(1, 4096 // bins)


@torch.library.custom_op("deepseek_kernels::moe_spread", mutates_args=())
def spread(x: Tensor, inverse: Tensor) -> Tensor:
    """Each token's row, at all places that `inverse` gives it."""
    out, x = _new_spread(x, inverse), _rows_readable(x)
    if out.numel():
        arguments = (x, inverse.contiguous(), out, inverse.shape[1], x.shape[1], x.stride(0))
        with torch.cuda.device_of(x):
            columns = _COLUMNS if x.element_size() > 1 else _BYTES
            _spread_kernel[_grid(*x.shape, columns)](*arguments, **_OPTIONS | {"COLUMNS": columns})
    return out


@spread.register_fake
def _new_spread(x: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(inverse.numel(), x.shape[1])


@torch.library.custom_op("deepseek_kernels::moe_combine", mutates_args=())
def combine(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """The sum over each token's rows of y, weighted or not."""
    out, y = _new_combined(y, weights, inverse), _rows_readable(y)
    if out.numel():
        plain = y if weights is None else weights.contiguous()
        arguments = (y, plain, inverse.contiguous(), out, inverse.shape[1], y.shape[1], y.stride(0))
        with torch.cuda.device_of(y):
            _combine_kernel[_grid(*out.shape)](*arguments, WEIGHTED=weights is not None, **_OPTIONS)
    return out


@combine.register_fake
def _new_combined(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    return y.new_empty(inverse.shape[0], y.shape[1])


@torch.library.custom_op("deepseek_kernels::moe_combine_backward", mutates_args=())
def _combine_backward(
    grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor, need_y: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = _new_gradients(grad, y, weights, inverse, need_y, need_weights)
    grad, y, choices = _rows_readable(grad), _rows_readable(y), inverse.shape[1]
    if inverse.numel():
        arguments = (grad, y, weights.contiguous(), inverse.contiguous(), grad_y, grad_weights, choices, y.shape[1])
        needs = {"NEED_Y": need_y, "NEED_WEIGHTS": need_weights}
        with torch.cuda.device_of(y):
            _combine_backward_kernel[(grad.shape[0],)](*arguments, grad.stride(0), y.stride(0), **needs, **_OPTIONS)
    return grad_y, grad_weights


@_combine_backward.register_fake
def _new_gradients(
    grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor, need_y: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape if need_y else 0), weights.new_empty(weights.shape if need_weights else 0)


def _remember_inverse(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_spread(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (inverse,) = ctx.saved_tensors
    return combine(grad, None, inverse), None


def _remember_all(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_combine(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    y, weights, inverse = ctx.saved_tensors
    if weights is None:  # only in the derivative of a derivative
        return spread(grad, inverse), None, None
    need_y, need_weights, _ = ctx.needs_input_grad
    grad_y, grad_weights = _combine_backward(grad, y, weights, inverse, need_y, need_weights)
    return grad_y if need_y else None, grad_weights if need_weights else None, None


spread.register_autograd(_differentiate_spread, setup_context=_remember_inverse)
combine.register_autograd(_differentiate_combine, setup_context=_remember_all)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return spread(x, inverse)


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return combine(y, weights, inverse)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    integers = dict.fromkeys(["pairs", "experts", "blocks", "choices"], "i32")
    sizes = dict.fromkeys(["columns", "x_stride", "y_stride", "grad_stride"], "i32")
    sorted_ = dict.fromkeys(["expert_ids", "order", "inverse", "ends"], "*i64") | {"counts": "*i32"}
    cases = [
        CompileCase(
            name=f"{label} of 256 experts",
            kernel=function,
            arguments=sorted_ | integers,
            constants={"STEP": _STEP, "STEPS": _STEPS, "EXPERTS": 512, **constants},
            num_warps=4,
            targets=targets,
            # Scalar registers, which an AMD GPU spills to lanes of a vector register and not to memory.
            expect={"spills": 80 if targets == ("gfx942",) else 0},
        )
        for label, function, constants in (
            ("count", _count_kernel, {}),
            ("place", _place_kernel, {"ROWS": _table_rows(512)}),
        )
        for targets in (everywhere[:-1], everywhere[-1:])
    ]
    movements = [
        ("spread", _spread_kernel, {}),
        ("combine", _combine_kernel, {"WEIGHTED": False}),
        ("combine, weighted", _combine_kernel, {"WEIGHTED": True}),
        ("combine backward", _combine_backward_kernel, {"NEED_Y": True, "NEED_WEIGHTS": True}),
        ("combine backward, y", _combine_backward_kernel, {"NEED_Y": True, "NEED_WEIGHTS": False}),
        ("combine backward, weights", _combine_backward_kernel, {"NEED_Y": False, "NEED_WEIGHTS": True}),
    ]
    for dtype, targets in (("bf16", everywhere), ("fp32", ("sm_90",)), ("u8", everywhere)):
        rows = dict.fromkeys(["x", "y", "out", "grad", "grad_y"], f"*{dtype}")
        pointers = {"weights": "*fp32", "grad_weights": "*fp32", "inverse": "*i64"}
        cases += [
            CompileCase(
                name=f"{label}, {dtype}",
                kernel=function,
                arguments=rows | pointers | integers | sizes,
                constants={"COLUMNS": _BYTES if dtype == "u8" else _COLUMNS, **constants},
                num_warps=4,
                aligned=frozenset(sizes),
                targets=targets,
                options={"enable_fp_fusion": False},
            )
            for label, function, constants in (movements[:1] if dtype == "u8" else movements)
        ]
    return cases
