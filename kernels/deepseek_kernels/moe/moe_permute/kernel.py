"""Sorting by expert, and both movements of rows, in Triton; no atomics on floats, no waiting for the device.

Both movements go token by token: a program reads a token's row once and writes its K sorted rows, or reads those and
writes their sum. By sorted row, the token's row would be read K times, from memory and not from a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ids_of(expert_ids, pair, pairs, experts, EXPERTS: tl.constexpr):
    """Experts of these pairs; EXPERTS - 1 beyond the last pair."""
    ids = tl.load(expert_ids + pair, pair < pairs, other=0)
    ids = tl.where((ids >= 0) & (ids < experts), ids, experts)  # a wrong id must not index other memory
    return tl.where(pair < pairs, ids, EXPERTS - 1).to(tl.int32)


@triton.jit
def count_kernel(expert_ids, counts, pairs, experts, STEP: tl.constexpr, STEPS: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts each expert's pairs in each block of STEP * STEPS pairs: counts [blocks, EXPERTS]."""
    total, first = tl.zeros((EXPERTS,), tl.int32), tl.program_id(0).to(tl.int64) * STEP * STEPS
    for start in tl.range(first, tl.minimum(first + STEP * STEPS, pairs), STEP):
        pair = start + tl.arange(0, STEP)
        total += tl.histogram(_ids_of(expert_ids, pair, pairs, experts, EXPERTS), EXPERTS)
    tl.store(counts + tl.program_id(0).to(tl.int64) * EXPERTS + tl.arange(0, EXPERTS), total)


@triton.jit
def place_kernel(
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
    """Places of pairs: behind all pairs of smaller experts, and the earlier pairs of the same expert."""
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
def spread_kernel(x, inverse, out, choices, columns, x_stride, COLUMNS: tl.constexpr):
    """Writes a token's row to all of its sorted rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    values = tl.load(x + token * x_stride + column, inside)
    for choice in tl.range(choices):
        row = tl.load(inverse + token * choices + choice)
        tl.store(out + row * columns + column, values, inside)


@triton.jit
def combine_kernel(y, weights, inverse, out, choices, columns, y_stride, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """One choice after the other, product and sum each rounded to float32, as the reference does it."""
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
def combine_backward_kernel(
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
    """Gradients of a token's sorted rows and of its weights."""
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
