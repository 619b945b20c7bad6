"""Cases of `moe_permute` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from . import kernel
from .configs import BYTE_COLUMNS, COLUMNS, STEP, STEPS, table_rows


def compile_cases() -> list[CompileCase]:
    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    integers = dict.fromkeys(["pairs", "experts", "blocks", "choices"], "i32")
    sizes = dict.fromkeys(["columns", "x_stride", "y_stride", "grad_stride"], "i32")
    sorted_ = dict.fromkeys(["expert_ids", "order", "inverse", "ends"], "*i64") | {"counts": "*i32"}
    cases = [
        CompileCase(
            name=f"{label} of 256 experts",
            kernel=function,
            arguments=sorted_ | integers,
            constants={"STEP": STEP, "STEPS": STEPS, "EXPERTS": 512, **constants},
            num_warps=4,
            targets=targets,
            # Scalar registers, which an AMD GPU spills to lanes of a vector register and not to memory.
            expect={"spills": 80 if targets == ("gfx942",) else 0},
        )
        for label, function, constants in (
            ("count", kernel.count_kernel, {}),
            ("place", kernel.place_kernel, {"ROWS": table_rows(512)}),
        )
        for targets in (everywhere[:-1], everywhere[-1:])
    ]
    movements = [
        ("spread", kernel.spread_kernel, {}),
        ("combine", kernel.combine_kernel, {"WEIGHTED": False}),
        ("combine, weighted", kernel.combine_kernel, {"WEIGHTED": True}),
        ("combine backward", kernel.combine_backward_kernel, {"NEED_Y": True, "NEED_WEIGHTS": True}),
        ("combine backward, y", kernel.combine_backward_kernel, {"NEED_Y": True, "NEED_WEIGHTS": False}),
        ("combine backward, weights", kernel.combine_backward_kernel, {"NEED_Y": False, "NEED_WEIGHTS": True}),
    ]
    for dtype, targets in (("bf16", everywhere), ("fp32", ("sm_90",)), ("u8", everywhere)):
        rows = dict.fromkeys(["x", "y", "out", "grad", "grad_y"], f"*{dtype}")
        pointers = {"weights": "*fp32", "grad_weights": "*fp32", "inverse": "*i64"}
        cases += [
            CompileCase(
                name=f"{label}, {dtype}",
                kernel=function,
                arguments=rows | pointers | integers | sizes,
                constants={"COLUMNS": BYTE_COLUMNS if dtype == "u8" else COLUMNS, **constants},
                num_warps=4,
                aligned=frozenset(sizes),
                targets=targets,
                options={"enable_fp_fusion": False},
            )
            for label, function, constants in (movements[:1] if dtype == "u8" else movements)
        ]
    return cases
