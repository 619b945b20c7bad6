"""Cases of `rms_norm` for the compile gate: the published widths, the widest, and the smallest."""

from __future__ import annotations

from typing import Any

from ...testing.compile_gate import CompileCase, Kind
from .backward import backward_kernel
from .configs import OPTIONS, backward_stages, backward_tile, forward_tile
from .kernel import forward_kernel

_NUMBERS: dict[str, Kind] = {
    **dict.fromkeys(["rstd", "scales", "partials"], "*fp32"),
    **{"eps": "fp32", "per_column": "fp32", "rows": "i32", "columns": "i32:16", "rows_each": "i32"},
}


def compile_cases() -> list[CompileCase]:
    wide, everywhere = ("sm_90",), ("sm_90", "sm_80", "sm_100", "gfx942")
    cases: list[CompileCase] = []

    def add(name, function, dtype, tile, targets, constants, out=None, weight=None, strides=(), spills=0):
        values = ("x", "residual", "weight", "out", "total", "grad", "grad_total", "grad_x")
        kinds = _NUMBERS | dict.fromkeys(values, f"*{dtype}")
        kinds |= {"out": f"*{out or dtype}", "weight": f"*{weight or dtype}"}
        kinds |= {"strides": strides or ("i32:16",) * (4 if function is forward_kernel else 3)}
        cases.append(
            CompileCase(
                name=f"{name} of {tile.columns}, {dtype}" + (f", weight {weight}" if weight else ""),
                kernel=function,
                arguments={name: kind for name, kind in kinds.items() if name not in constants},
                constants={**tile.blocks, **constants},
                num_warps=tile.num_warps,
                targets=targets,
                options=OPTIONS,
                expect={"spills": spills},
            )
        )

    codes: dict[str, Any] = {"ADD": True, "QUANTIZE": True, "POWER_OF_TWO": False}
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
    ones = {"rows": 1, "columns": 1}
    one, tile = (1, 1, "i32:16", 1), forward_tile(1, 1)
    add("one row of one", forward_kernel, "bf16", tile, wide, {**plain, **ones}, strides=one)
    add("codes of one row of one", forward_kernel, "bf16", tile, wide, {**codes, **ones}, out="fp8e4nv", strides=one)
    constants = {"rows_each": 1, "ADD": True, "NEED_WEIGHT": True, "STAGES": 3}
    add("backward, a row each", backward_kernel, "bf16", backward_tile(7168), wide, constants)
    add(
        "backward, one row of one", backward_kernel, "bf16", backward_tile(1), wide, constants | ones, strides=(1, 1, 1)
    )
    return cases
