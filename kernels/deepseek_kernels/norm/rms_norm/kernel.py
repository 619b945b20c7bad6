"""RMS norm in Triton: a block holds whole rows in its registers, so that everything is read once.

The order in which `tl.sum` adds depends on how the compiler lays a row out over threads, and that on what else a kernel
does: one that stores codes has another than one that stores values. `inverse_root` spells the order out instead, so
that every kernel here, whatever its tile, and `latent_write` find the same for a row, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ...quant.fp8_quantize.kernel import encode, scale_of
from ...quant.fp8_quantize.launch import ENOUGH_PROGRAMS, cdiv
from ...quant.fp8_quantize.reference import ACTIVATION_FLOOR, GROUP

# No fusion of products into sums, which compilers choose case by case too.
OPTIONS = {"enable_fp_fusion": False}
BACKWARD_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200; as many rows of partial sums
_SHARED = 96 * 1024  # bytes of shared memory that every GPU since compute capability 8.6 has


@dataclass(frozen=True)
class Tile:
    """What one program takes at a time, whole rows, and its warps."""

    rows: int
    columns: int
    num_warps: int


def forward_tile(rows: int, columns: int) -> Tile:
    """32 values a thread; few rows get a program each."""
    width = max(GROUP, triton.next_power_of_2(columns))
    many = Tile(max(1, 4096 // width), width, max(4, width // 1024))
    if cdiv(rows, many.rows) >= ENOUGH_PROGRAMS or many.rows == 1:
        return many
    return Tile(1, width, max(1, width // 512))


def backward_tile(columns: int) -> Tile:
    """16 values a thread: a row's x, its gradient, the weight and the sums for its gradient are all held at once."""
    width = max(GROUP, triton.next_power_of_2(columns))
    return Tile(max(1, 4096 // width), width, max(8, width // 512))


def backward_stages(tile: Tile, bytes_each: int) -> int:
    """3 for rows that are read while those before them are computed, if the memory for them fits; 1 if not.

    Args:
        bytes_each: of what is read for one element.
    """
    return 3 if 2 * tile.rows * tile.columns * bytes_each <= _SHARED else 1


@triton.jit
def inverse_root(values, per_column, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 / sqrt(mean(values^2) + eps) of each row: neighbours are added first, then neighbouring pairs, and so on.

    A sum of two numbers has one result, so that layouts have no say. Zeros beyond the last column change nothing.

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
    x_stride,
    residual_stride,
    out_stride,
    scales_stride,
    eps,
    per_column,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """`out` are values, or codes with QUANTIZE; `total` is x itself without ADD. `per_column` is 1 / columns."""
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
        # As [groups, GROUP]: in the shape of what is read, codes of one byte would be laid out over threads so that
        # each gets 16 in a row, and everything that is read too, in strides.
        GROUPS: tl.constexpr = COLUMNS // GROUP
        grouped = tl.reshape(normed.to(tl.float32), (ROWS * GROUPS, GROUP))
        scale = scale_of(tl.max(tl.abs(grouped), 1), FLOOR, POWER_OF_TWO)  # [ROWS * GROUPS]
        codes = encode(grouped, scale[:, None], POWER_OF_TWO)
        place = tl.arange(0, ROWS * GROUPS)
        row = tl.program_id(0).to(tl.int64) * ROWS + place // GROUPS
        group = place % GROUPS
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(out + row[:, None] * out_stride + column, codes, (row < rows)[:, None] & (column < columns))
        inside = (row < rows) & (group * GROUP < columns)
        tl.store(scales + group.to(tl.int64) * scales_stride + row, scale, inside)


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
    grad_stride,
    grad_total_stride,
    total_stride,
    per_column,
    ADD: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes `rows_each` rows and sums what they give to the weight's gradient: partials [programs, columns].

    With n = x * rstd and g = grad * weight: grad_x = rstd * (g - n * mean(g * n)), plus, with ADD, the sum's own.
    """
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
            summed += slope * normed.to(values.dtype).to(tl.float32)  # rounded as the forward pass has it
        slope *= factor.to(tl.float32)[None, :]
        mean = tl.sum(slope * normed, 1)[:, None] * per_column
        slope = (slope - normed * mean) * inverse
        if ADD:
            slope += passed_on.to(tl.float32)
        tl.store(grad_x + row[:, None] * columns + column[None, :], slope.to(grad_x.dtype.element_ty), inside)
    if NEED_WEIGHT:
        at = partials + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(at, tl.sum(summed, 0), column < columns)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    strides = ["x_stride", "residual_stride", "out_stride", "scales_stride", "grad_stride", "grad_total_stride"]
    sizes = ["rows", "columns", "rows_each", *strides, "total_stride"]
    floats = {"rstd": "*fp32", "scales": "*fp32", "partials": "*fp32", "eps": "fp32", "per_column": "fp32"}
    wide, everywhere = ("sm_90",), ("sm_90", "sm_80", "sm_100", "gfx942")
    cases = []

    def add(name, kernel, dtype, tile, targets, constants, out=None, weight=None, spills=0):
        values = ("x", "residual", "weight", "out", "total", "grad", "grad_total", "grad_x")
        pointers = dict.fromkeys(values, f"*{dtype}")
        pointers |= {"out": f"*{out or dtype}", "weight": f"*{weight or dtype}"}
        cases.append(
            CompileCase(
                name=f"{name} of {tile.columns}, {dtype}" + (f", weight {weight}" if weight else ""),
                kernel=kernel,
                arguments=pointers | floats | dict.fromkeys({*sizes} - {*constants}, "i32"),
                constants={"ROWS": tile.rows, "COLUMNS": tile.columns, **constants},
                num_warps=tile.num_warps,
                aligned=frozenset(sizes) - {"rows", "rows_each"},
                targets=targets,
                options=OPTIONS,
                expect={"spills": spills},
            )
        )

    codes = {"ADD": True, "QUANTIZE": True, "GROUP": GROUP, "FLOOR": ACTIVATION_FLOOR, "POWER_OF_TWO": False}
    plain = {**codes, "ADD": False, "QUANTIZE": False}
    for rows, columns in ((8192, 7168), (8192, 16384), (8192, 1536), (8192, 512), (64, 1536), (64, 512), (64, 64)):
        tile, targets = forward_tile(rows, columns), everywhere if columns in (7168, 1536) else wide
        kind = "many rows" if rows > 64 else "few rows"
        with_codes = tuple(target for target in targets if target != "sm_80")
        add(kind, forward_kernel, "bf16", tile, targets, plain)
        add(f"sum, {kind}", forward_kernel, "bf16", tile, wide, {**plain, "ADD": True})
        add(f"sum and codes, {kind}", forward_kernel, "bf16", tile, with_codes, codes, out="fp8e4nv")
    for columns in (7168, 16384):
        tile = forward_tile(8192, columns)
        constants = {**codes, "POWER_OF_TWO": True}
        add("sum and codes, ue8m0, many rows", forward_kernel, "bf16", tile, wide, constants, out="fp8e4nv")
        add("sum and codes, many rows", forward_kernel, "fp32", tile, wide, codes, out="fp8e4nv")
        add("sum, many rows", forward_kernel, "fp32", tile, wide, {**plain, "ADD": True})
        add("many rows", forward_kernel, "bf16", tile, wide, plain, out="fp32", weight="fp32")
    for dtype, columns in [
        *(("bf16", columns) for columns in (7168, 16384, 1536, 512)),
        ("fp32", 7168),
        ("fp32", 16384),
    ]:
        tile, targets = backward_tile(columns), everywhere if (dtype, columns) == ("bf16", 7168) else wide
        for added, need in ((True, True), (False, True), (False, False)):
            name = "backward" + (", sum" if added else "") + ("" if need else ", frozen weight")
            stages = backward_stages(tile, (2 + added) * (2 if dtype == "bf16" else 4))
            constants = {"ADD": added, "NEED_WEIGHT": need, "STAGES": stages}
            # 16384 columns leave four registers for each: too few, and wider than any published model.
            spills = 128 if columns == 16384 and need else 0
            add(name, backward_kernel, dtype, tile, targets, constants, spills=spills)
    # Numbers that are 1 are constants to the compiler.
    ones = {"rows": 1, "columns": 1, "x_stride": 1, "residual_stride": 1, "scales_stride": 1}
    add("one row of one", forward_kernel, "bf16", forward_tile(1, 1), wide, {**plain, **ones})
    add("codes of one row of one", forward_kernel, "bf16", forward_tile(1, 1), wide, {**codes, **ones}, out="fp8e4nv")
    constants = {"rows_each": 1, "ADD": True, "NEED_WEIGHT": True, "STAGES": 3}
    add("backward, a row each", backward_kernel, "bf16", backward_tile(7168), wide, constants)
    constants |= {"rows": 1, "columns": 1, "grad_stride": 1, "grad_total_stride": 1, "total_stride": 1}
    add("backward, one row of one", backward_kernel, "bf16", backward_tile(1), wide, constants)
    return cases
