"""The gradient of the RMS norm in Triton, without atomics: the same bits in every run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def backward_kernel(
    grad,
    grad_total,
    total,
    weight,
    rstd,
    grad_x,
    partials,
    rows,
    columns,
    rows_each,
    strides,
    per_column,
    ADD: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes `rows_each` rows and sums their part of the weight's gradient: partials [programs, columns].

    With n = x * rstd and g = grad * weight: grad_x = rstd * (g - n * mean(g * n)), plus, with ADD, the sum's own.
    `strides` are of rows of grad, grad_total and total.
    """
    grad_stride, grad_total_stride, total_stride = strides
    first = tl.program_id(0).to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, rows)
    column = tl.arange(0, COLUMNS)
    factor = tl.load(weight + column, column < columns, other=0.0)
    summed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < columns)[None, :]
        values = tl.load(total + row[:, None] * total_stride + column[None, :], inside, other=0.0)
        slope = tl.load(grad + row[:, None] * grad_stride + column[None, :], inside, other=0.0).to(tl.float32)
        if ADD:
            at = grad_total + row[:, None] * grad_total_stride + column[None, :]
            passed_on = tl.load(at, inside, other=0.0)
        inverse = tl.load(rstd + row, row < last, other=0.0)[:, None]
        normed = values.to(tl.float32) * inverse
        if NEED_WEIGHT:
            summed += slope * normed.to(values.dtype).to(tl.float32)  # rounded as in the forward pass
        slope *= factor.to(tl.float32)[None, :]
        mean = tl.sum(slope * normed, 1)[:, None] * per_column
        slope = (slope - normed * mean) * inverse
        if ADD:
            slope += passed_on.to(tl.float32)
        tl.store(grad_x + row[:, None] * columns + column[None, :], slope.to(grad_x.dtype.element_ty), inside)
    if NEED_WEIGHT:
        at = partials + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(at, tl.sum(summed, 0), column < columns)
