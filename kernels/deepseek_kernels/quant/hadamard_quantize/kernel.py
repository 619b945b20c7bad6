"""The Hadamard rotation in Triton, log2(D) passes of sums and differences in registers, and quantization behind it.

Sums have the order of the reference, so that both agree bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..fp8_quantize.kernel import ACTIVATION_FLOOR, GROUP, encode, scale_of


@triton.jit
def rotated(values, FACTOR: tl.constexpr, PASSES: tl.constexpr):
    """Rows [ROWS, D] of float32 times the Hadamard matrix, and FACTOR; D is 2 to the power PASSES.

    Each pass adds and subtracts the neighbours in pairs and puts sums in front of differences. After all passes, each
    with the same pattern, every feature is back in its place: they take the bits of its index one after the other.
    """
    ROWS: tl.constexpr = values.shape[0]
    D: tl.constexpr = values.shape[1]
    for _ in tl.static_range(PASSES):
        first, second = tl.split(values.reshape(ROWS, D // 2, 2))
        values = tl.join(first + second, first - second).permute(0, 2, 1).reshape(ROWS, D)
    return values * FACTOR


@triton.jit
def hadamard_kernel(
    x, out, rows, stride, ROWS: tl.constexpr, D: tl.constexpr, FACTOR: tl.constexpr, PASSES: tl.constexpr
):
    """ROWS rows; `stride` is of rows of x, those of `out` are side by side."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    inside = (row < rows)[:, None]
    values = tl.load(x + row[:, None] * stride + c[None, :], inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * D + c[None, :], rotated(values, FACTOR, PASSES).to(out.dtype.element_ty), inside)


@triton.jit
def hadamard_quantize_kernel(
    x,
    codes,
    scales,
    rows,
    strides,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    PASSES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """ROWS rows; `strides` are of rows of x and codes, and of groups of scales."""
    x_stride, codes_stride, scales_stride = strides
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    row, c, group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, GROUPS)
    inside = (row < rows)[:, None]
    values = tl.load(x + row[:, None] * x_stride + c[None, :], inside, other=0.0).to(tl.float32)
    values = rotated(values, FACTOR, PASSES).to(x.dtype.element_ty).to(tl.float32)
    values = values.reshape(ROWS, GROUPS, D // GROUPS)
    scale = scale_of(tl.max(tl.abs(values), 2), ACTIVATION_FLOOR, POWER_OF_TWO)  # [ROWS, GROUPS]
    out = encode(values, scale[:, :, None], POWER_OF_TWO).reshape(ROWS, D)
    tl.store(codes + row[:, None] * codes_stride + c[None, :], out, inside)
    tl.store(scales + group[None, :] * scales_stride + row[:, None], scale, inside)
