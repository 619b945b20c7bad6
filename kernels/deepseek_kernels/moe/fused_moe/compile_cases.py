"""Cases of `fused_moe` for the compile gate: every configuration that is launched; `grouped_gemm` has the rest."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from ..grouped_gemm.compile_cases import expectations
from ..grouped_gemm.configs import Config
from . import configs, kernel
from .configs import FEW, MANY, MEDIUM, SUM_COLUMNS, UNALIGNED, WIDE

_NAMES = {id(config): name.lower() for name, config in vars(configs).items() if isinstance(config, Config)}
_EVERYWHERE = ("sm_90", "sm_80", "sm_100")  # gfx942 has cases of its own, with fewer stages


def _case(
    label: str,
    config: Config,
    dtype: str,
    targets: tuple[str, ...] = ("sm_90",),
    aligned: bool = True,
    depth_stride: str | int = 1,
    **constants,
) -> CompileCase:
    # float32 has no matrix units: with odd sizes, Triton 3.6 keeps three registers on the stack.
    spills = {"spills": 16 if dtype == "fp32" else 0}
    size = "i32:16" if aligned else "i32"
    return CompileCase(
        name=f"{label}, {_NAMES[id(config)]}, {dtype}",
        kernel=kernel.specialized_swiglu_product_kernel if config.specialized else kernel.swiglu_product_kernel,
        arguments={
            **dict.fromkeys(["x", "weight", "out"], f"*{dtype}"),
            **{"table": "*i32", "order": "*i64", "choices": "i32", "rows": "i32", "sizes": ("i32", size, size)},
            **{"x_stride": size, "weight_strides": (size, size, depth_stride)},
        },
        constants={"TILE": config.tile, **constants},
        num_warps=config.num_warps,
        num_stages=config.stages(hip=targets == ("gfx942",)),
        targets=targets,
        expect=expectations(config, dtype) | spills,
    )


def compile_cases() -> list[CompileCase]:
    cases = [_case("rows in place", WIDE, dtype) for dtype in ("bf16", "fp16")]
    for config in (FEW, MEDIUM, MANY):
        for gather, label in ((True, "gathered"), (False, "rows in place")):
            for targets in (tuple(one for one in _EVERYWHERE if one != "sm_80" or config is not MANY), ("gfx942",)):
                cases.append(_case(label, config, "bf16", targets, GATHER=gather))
    cases.append(_case("gathered", MANY, "fp16", GATHER=True))
    for dtype in ("bf16", "fp32"):
        cases.append(_case("gathered", UNALIGNED, dtype, aligned=False, GATHER=True))
        cases.append(_case("gathered, any strides", UNALIGNED, dtype, aligned=False, depth_stride="i32", GATHER=True))
    cases.append(_case("rows in place", UNALIGNED, "bf16", aligned=False, GATHER=False))
    cases += [
        CompileCase(
            name=f"sum, {dtype}",
            kernel=kernel.sum_kernel,
            arguments={
                **dict.fromkeys(["y", "out"], f"*{dtype}"),
                **{"weights": "*fp32", "inverse": "*i64", "ends": "*i64"},
                **dict.fromkeys(["choices", "experts"], "i32"),
                "columns": "i32:16",
            },
            constants={"COLUMNS": SUM_COLUMNS},
            num_warps=4,
            targets=("sm_90", "sm_80", "sm_100", "gfx942"),
            options={"enable_fp_fusion": False},
        )
        for dtype in ("bf16", "fp32")
    ]
    return cases
