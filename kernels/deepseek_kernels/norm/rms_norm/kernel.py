"""RMS norm in Triton: a block holds whole rows in its registers, so that everything is read once.

The order in which `tl.sum` adds depends on how the compiler lays a row out over threads, and that on the rest of the
kernel: one that stores e4m3 has another layout than one that stores bfloat16. `inverse_root` spells the order out, so
that every kernel here, whatever its tile, and `latent_write` compute the same for a row, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.fp8_quantize.kernel import ACTIVATION_FLOOR, GROUP, encode, scale_of


@triton.jit
def inverse_root(values, per_column, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 / sqrt(mean(values^2) + eps) of each row: neighbours are added first, then neighbouring pairs, and so on.

    A sum of two numbers has one result, whatever the layout. Zeros beyond the last column change nothing.

    Args:
        values: [ROWS, COLUMNS] float32, 2^14 columns at most.
        per_column: 1 / the columns that count.
    """
    total = values * values
    for level in tl.static_range(14):
        if COLUMNS >> level > 1:
            total = tl.sum(tl.reshape(total, (ROWS, COLUMNS >> (level + 1), 2)), 2)
    return tl.rsqrt(tl.reshape(total, (ROWS,)) * per_column + eps)


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    out,
    total,
    rstd,
    scales,
    rows,
    columns,
    strides,
    eps,
    per_column,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Norms ROWS rows: `out` are values, or e4m3 with QUANTIZE; `total` is x itself without ADD.

    `strides` are of rows of x, residual and out, and of groups of scales; `per_column` is 1 / columns.
    """
    x_stride, residual_stride, out_stride, scales_stride = strides
    TOTAL: tl.constexpr = total.dtype.element_ty
    OUT: tl.constexpr = TOTAL if weight.dtype.element_ty == TOTAL else tl.float32  # torch's promotion of the three
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row[:, None] * residual_stride + column[None, :], inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, column < columns, other=0.0)
    values = values.to(TOTAL)
    if ADD:
        tl.store(total + row[:, None] * columns + column[None, :], values, inside)
    values = values.to(tl.float32)
    inverse = inverse_root(values, per_column, eps, ROWS, COLUMNS)
    normed = (values * inverse[:, None]).to(TOTAL).to(tl.float32)
    normed = (normed * factor.to(tl.float32)[None, :]).to(OUT)
    if not QUANTIZE:
        tl.store(rstd + row, inverse, row < rows)
        tl.store(out + row[:, None] * out_stride + column[None, :], normed, inside)
    else:
        # As [groups, GROUP]: in the shape of the loads, values of one byte would be laid out over threads so that each
        # gets 16 in a row, and so would the loads, which would become strided.
        GROUPS: tl.constexpr = COLUMNS // GROUP
        grouped = tl.reshape(normed.to(tl.float32), (ROWS * GROUPS, GROUP))
        scale = scale_of(tl.max(tl.abs(grouped), 1), ACTIVATION_FLOOR, POWER_OF_TWO)  # [ROWS * GROUPS]
        codes = encode(grouped, scale[:, None], POWER_OF_TWO)
        place = tl.arange(0, ROWS * GROUPS)
        row = tl.program_id(0).to(tl.int64) * ROWS + place // GROUPS
        group = place % GROUPS
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(out + row[:, None] * out_stride + column, codes, (row < rows)[:, None] & (column < columns))
        inside = (row < rows) & (group * GROUP < columns)
        tl.store(scales + group.to(tl.int64) * scales_stride + row, scale, inside)
