"""Cases of `swiglu_quantize` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from ..fp8_quantize.configs import FEW, MANY
from .kernel import swiglu_kernel


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name=f"{label}, {dtype}" + (", ue8m0" if power_of_two else ""),
            kernel=swiglu_kernel,
            arguments={
                **{"x": f"*{dtype}", "codes": "*fp8e4nv", "scales": "*fp32"},
                **{"rows": "i32:16", "columns": "i32:16", "strides": ("i32:16",) * 3},
            },
            constants={**tile.blocks, "POWER_OF_TWO": power_of_two},
            num_warps=tile.num_warps,
            targets=("sm_90", "sm_100", "gfx942") if dtype == "bf16" and not power_of_two else ("sm_90",),
        )
        for label, tile in (("many rows", MANY), ("few rows", FEW))
        for dtype, power_of_two in (("bf16", False), ("bf16", True), ("fp32", False))
    ]
