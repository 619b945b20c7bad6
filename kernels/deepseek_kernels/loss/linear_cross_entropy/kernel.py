"""Linear cross-entropy in Triton: cuBLAS multiplies, one kernel turns a chunk of logits into losses and gradients.

A row of V3's vocabulary is a quarter of a megabyte: as much as all registers of a multiprocessor. So the kernel reads a
row in blocks, keeping the greatest value and the sum of exponentials (online softmax), and then reads it again, from L2
for the most part, to write its gradients in its place. Next to the three products of a chunk either takes few percent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import by_segment, connect, walk

__all__ = ["chunk_bytes", "compile_cases", "linear_cross_entropy_triton"]

_COLUMNS = 8192
_WARPS = 8


def chunk_bytes(need_weight: bool) -> int:
    """Of a chunk's logits: 4096 tokens of V3's vocabulary in bfloat16, or 1024 where the weight is frozen.

    Each chunk reads and writes the weight's float32 gradient, 7.4 GB for V3: by an H200's figures a fifth of the time
    that the products of 1024 tokens take, a twentieth for 4096.
    """
    return 1 << 30 if need_weight else 1 << 28


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, right, columns, stride, ignore_index, COLUMNS: tl.constexpr, GRADIENT: tl.constexpr
):
    """One row a program."""
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


@torch.library.custom_op("deepseek_kernels::linear_cross_entropy_triton", mutates_args=())
def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segments: Sequence[int],
    ignore_index: int,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def step(logits: Tensor, targets: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor]:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        right = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
        arguments = (logits, targets, losses, right, logits.shape[1], logits.stride(0), ignore_index)
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[(logits.shape[0],)](
                *arguments, COLUMNS=_COLUMNS, GRADIENT=need_gradient, num_warps=_WARPS
            )
        return losses, right

    # How many rows are ignored is known to the device alone, so they are computed; as zeros, since a gradient of zero
    # times a NaN that stands in one would be a NaN of the weight's gradient.
    ignored = targets == ignore_index
    targets = targets.contiguous()
    losses, right, grad_hidden, grad_weight = walk(
        step,
        hidden.masked_fill(ignored[:, None], 0),
        weight,
        targets,
        segments,
        chunk,
        (need_hidden, need_weight),
    )
    counts = (by_segment(values, segments) for values in (right, ~ignored))
    return by_segment(losses, segments), *counts, grad_hidden, grad_weight


connect(linear_cross_entropy_triton)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    return [
        CompileCase(
            name=f"{'gradient' if gradient else 'loss'}, {dtype}{'' if aligned else ', unaligned'}",
            kernel=_cross_entropy_kernel,
            arguments={
                "logits": f"*{dtype}",
                "targets": "*i64",
                "losses": "*fp32",
                "right": "*i32",
                "columns": "i32",
                "stride": "i32",
                "ignore_index": "i32",
            },
            constants={"COLUMNS": _COLUMNS, "GRADIENT": gradient},
            num_warps=_WARPS,
            aligned=frozenset({"columns", "stride"} if aligned else ()),
            targets=("sm_90", "sm_80", "sm_100", "gfx942") if aligned else ("sm_90",),
        )
        for dtype in ("bf16", "fp16", "fp32")
        for gradient in (True, False)
        for aligned in (True, False)
    ]
