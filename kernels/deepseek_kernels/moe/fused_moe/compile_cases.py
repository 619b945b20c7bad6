"""What the compile gate compiles of `fused_moe`: every configuration that is launched; `grouped_gemm` has the rest."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from ..grouped_gemm.configs import GROUP, Config
from . import configs, kernel
from .configs import FEW, MANY, MEDIUM, UNALIGNED, WIDE
from .launch import SUM_COLUMNS

_INTEGERS = ["choices", "experts", "rows", "width", "depth", "x_stride", "expert_stride", "width_stride"]
_NAMES = {id(config): name for name, config in vars(configs).items() if isinstance(config, Config)}
_EVERYWHERE = ("sm_90", "sm_80", "sm_100")  # gfx942 has cases of its own, with fewer stages


def _case(
    label: str, config: Config, dtype: str, targets: tuple[str, ...] = ("sm_90",), aligned: bool = True, **constants
) -> CompileCase:
    # wgmma takes 64 rows. float32 has no matrix units: with odd sizes, Triton 3.6 keeps three registers on the stack.
    expect: dict = {"no_mma_sync": config.rows >= 64, "spills": 16 if dtype == "fp32" else 0}
    if config.rows >= 64 and dtype != "fp32":
        expect["wgmma"] = f"m64n{config.columns}k16.f32.{dtype.replace('fp', 'f')}"
    if config.specialized:
        expect |= {"tma": True, "warp_specialized": True}
    pointers = dict.fromkeys(["x", "weight", "out"], f"*{dtype}") | {"table": "*i32", "order": "*i64"}
    integers = [*_INTEGERS, *(["depth_stride"] if "depth_stride" not in constants else [])]
    return CompileCase(
        name=f"{label}, {_NAMES[id(config)].lower()}, {dtype}",
        kernel=kernel.specialized_product_kernel if config.specialized else kernel.product_kernel,
        arguments=pointers | dict.fromkeys(integers, "i32"),
        constants={**config.blocks, "GROUP": GROUP, **constants},
        num_warps=config.num_warps,
        num_stages=config.stages(targets == ("gfx942",)),
        aligned=frozenset(integers if aligned else ()) - {"choices", "experts", "rows"},
        targets=targets,
        expect=expect,
    )


def compile_cases() -> list[CompileCase]:
    cases = [_case("rows in place", WIDE, dtype) for dtype in ("bf16", "fp16")]
    for config in (FEW, MEDIUM, MANY):
        for gather, label in ((True, "gathered"), (False, "rows in place")):
            for targets in (tuple(one for one in _EVERYWHERE if one != "sm_80" or config is not MANY), ("gfx942",)):
                cases.append(_case(label, config, "bf16", targets, GATHER=gather, depth_stride=1))
    cases.append(_case("gathered", MANY, "fp16", GATHER=True, depth_stride=1))
    for dtype in ("bf16", "fp32"):
        cases.append(_case("gathered", UNALIGNED, dtype, aligned=False, GATHER=True, depth_stride=1))
        cases.append(_case("gathered, any strides", UNALIGNED, dtype, aligned=False, GATHER=True))
    cases.append(_case("rows in place", UNALIGNED, "bf16", aligned=False, GATHER=False, depth_stride=1))
    cases += [
        CompileCase(
            name=f"sum, {dtype}",
            kernel=kernel.sum_kernel,
            arguments={
                **dict.fromkeys(["y", "out"], f"*{dtype}"),
                **{"weights": "*fp32", "inverse": "*i64", "ends": "*i64"},
                **dict.fromkeys(["choices", "experts", "columns"], "i32"),
            },
            constants={"COLUMNS": SUM_COLUMNS},
            num_warps=4,
            aligned=frozenset({"columns"}),
            targets=("sm_90", "sm_80", "sm_100", "gfx942"),
            options={"enable_fp_fusion": False},
        )
        for dtype in ("bf16", "fp32")
    ]
    return cases
