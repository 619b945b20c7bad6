"""Cases of `topk_gate` for the compile gate: the published models' sizes, and the largest."""

from __future__ import annotations

from ...common.host import power_of_two
from ...testing.compile_gate import CompileCase
from . import kernel
from .configs import places_of, tokens_of


def compile_cases() -> list[CompileCase]:
    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    pointers = {"ids": "*i64", **dict.fromkeys(["scores", "bias", "weights", "grad", "grad_scores"], "*fp32")}
    arguments = pointers | {"tokens": "i32", "scores_stride": "i32", "factor": "fp32"}
    # Experts, choices, groups, groups kept, their best, whether biased.
    models = {
        "V3": (256, 8, 8, 4, 2, True, everywhere),
        "V2": (160, 6, 8, 3, 1, False, ("sm_90",)),
        "V2-Lite": (64, 6, 1, 1, 1, False, ("sm_90",)),
        "Kimi-K2": (384, 8, 1, 1, 1, True, ("sm_90",)),
        "1024 experts": (1024, 16, 1, 1, 1, True, ("sm_90",)),
    }
    cases = []
    for label, (experts, top_k, groups, kept, best, biased, targets) in models.items():
        places = places_of(experts, groups, kept)
        common = {"EXPERTS": experts, "TOP_K": top_k, "NORMALIZE": True, "SLOTS": power_of_two(top_k)}
        gate = {**common, **places, "BEST": best, "BIASED": biased}
        back = {**common, "WIDTH": power_of_two(experts)}
        gate_width = places["GROUP_BLOCK"] * places["WIDTH"]
        for count in (64, 8192):
            for name, function, constants, width in (
                ("gate", kernel.gate_kernel, gate, gate_width),
                ("backward", kernel.backward_kernel, back, back["WIDTH"]),
            ):
                cases.append(
                    CompileCase(
                        name=f"{name}, {label}, {count} tokens",
                        kernel=function,
                        arguments=arguments,
                        constants={**constants, "TOKENS": tokens_of(count, width)},
                        num_warps=1,
                        aligned=frozenset({"scores_stride"}),
                        targets=targets,
                        options={"enable_fp_fusion": False} if function is kernel.gate_kernel else {},
                    )
                )
    return cases
