"""Cases of `linear_cross_entropy` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from .configs import COLUMNS, NUM_WARPS
from .kernel import cross_entropy_kernel


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name=f"{'gradient' if gradient else 'loss'}, {dtype}{'' if aligned else ', unaligned'}",
            kernel=cross_entropy_kernel,
            arguments={
                **{"logits": f"*{dtype}", "targets": "*i64", "losses": "*fp32", "right": "*i32"},
                **dict.fromkeys(["columns", "stride", "ignore_index"], "i32"),
            },
            constants={"COLUMNS": COLUMNS, "GRADIENT": gradient},
            num_warps=NUM_WARPS,
            aligned=frozenset({"columns", "stride"} if aligned else ()),
            targets=("sm_90", "sm_80", "sm_100", "gfx942") if aligned else ("sm_90",),
        )
        for dtype in ("bf16", "fp16", "fp32")
        for gradient in (True, False)
        for aligned in (True, False)
    ]
