"""Linear cross-entropy in Triton: cuBLAS multiplies, one kernel turns a chunk of logits into losses and gradients.

A row of V3's vocabulary is a quarter of a megabyte: as much as all registers of a multiprocessor. So the kernel reads a
row in blocks, keeping the greatest value and the sum of exponentials (online softmax), and then reads it again, from L2
for the most part, to write its gradients in its place. Next to the three products of a chunk either takes few percent.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, right, columns, stride, ignore_index, COLUMNS: tl.constexpr, GRADIENT: tl.constexpr
):
    """One row of logits a program: its loss, if its target is the greatest logit, and its gradients in its place."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    at = logits + row * stride
    column = tl.arange(0, COLUMNS)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(right + row, 0)
        if GRADIENT:
            nothing = tl.zeros((COLUMNS,), logits.dtype.element_ty)
            for start in tl.range(0, columns, COLUMNS):
                tl.store(at + start + column, nothing, start + column < columns)
    else:
        known = (target >= 0) & (target < columns)
        chosen = tl.load(at + target, known, other=float("nan")).to(tl.float32)
        greatest, total, guess = float("-inf"), 0.0, 0
        for start in tl.range(0, columns, COLUMNS):
            values = tl.load(at + start + column, start + column < columns, other=float("-inf")).to(tl.float32)
            numbers = tl.where(values == values, values, float("-inf"))  # a NaN decides nothing but the sum
            largest, where = tl.max(numbers, 0, return_indices=True, return_indices_tie_break_left=True)
            guess = tl.where(largest > greatest, start + where, guess)
            highest = tl.maximum(largest, greatest)
            shift = tl.where(highest == float("-inf"), 0.0, highest)  # minus infinities only: no difference of two
            total = total * tl.exp(greatest - shift) + tl.sum(tl.exp(values - shift), 0)
            greatest = highest
        normalizer = greatest + tl.log(total)
        loss = normalizer - chosen
        tl.store(losses + row, loss)
        tl.store(right + row, ((guess == target) & (loss == loss)).to(tl.int32))
        if GRADIENT:
            for start in tl.range(0, columns, COLUMNS):
                inside = start + column < columns
                values = tl.load(at + start + column, inside, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(values - normalizer) - tl.where(start + column == target, 1.0, 0.0)
                tl.store(at + start + column, gradient.to(logits.dtype.element_ty), inside)
