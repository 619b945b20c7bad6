"""What the compile gate compiles of `grouped_gemm`: every configuration that is launched."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from . import configs, kernel
from .configs import FEW, GROUP, MEDIUM, PLAIN, SQUARE, UNALIGNED, WIDE, Config

_SIZES = ["rows", "experts", "width", "depth", "height", "capacity"]
_STRIDES = ["x_stride", "grad_stride", "expert_stride", "width_stride", "depth_stride"]
_NAMES = {id(config): name for name, config in vars(configs).items() if isinstance(config, Config)}
_EVERYWHERE = ("sm_90", "sm_80", "sm_100")  # gfx942 has cases of its own, with fewer stages


def _case(
    label: str,
    function,
    config: Config,
    constants: dict,
    dtype: str = "bf16",
    targets: tuple[str, ...] = ("sm_90",),
    aligned: bool = True,
    **expected,
) -> CompileCase:
    hip = targets == ("gfx942",)
    expect: dict = {"no_mma_sync": config.rows >= 64, **expected}  # wgmma takes 64 rows
    if config.rows >= 64 and dtype != "fp32":
        expect["wgmma"] = f"m64n{config.columns}k16.f32.{dtype.replace('fp', 'f')}"
    if config.specialized:
        expect |= {"tma": True, "warp_specialized": True}
    pointers = dict.fromkeys(["x", "weight", "out", "grad"], f"*{dtype}") | {"table": "*i32", "ends": "*i64"}
    integers = [name for name in (*_SIZES, *_STRIDES) if name not in constants]
    return CompileCase(
        name=f"{label}, {_NAMES[id(config)].lower()}, {dtype}",
        kernel=function,
        arguments=pointers | dict.fromkeys(integers, "i32"),
        constants={**config.blocks, "GROUP": GROUP, **constants},
        num_warps=config.num_warps,
        num_stages=config.stages(hip),
        aligned=frozenset(integers if aligned else ()) - {"rows", "experts"},
        targets=targets,
        expect=expect,
    )


def compile_cases() -> list[CompileCase]:
    table = CompileCase(
        name="tile table of 256 experts",
        kernel=kernel._tile_table_kernel,
        arguments={"ends": "*i64", "table": "*i32", **dict.fromkeys(["rows", "experts", "owners", "capacity"], "i32")},
        constants={"BLOCK": 128, "TILES": kernel._TILES, "EXPERTS": 512},
        num_warps=4,
        targets=(*_EVERYWHERE, "gfx942"),
    )
    cases, product = [table], kernel._product_kernel
    units = {"forward": "depth_stride", "backward": "width_stride"}  # the compiler makes a stride of 1 a constant
    for config in (FEW, MEDIUM, PLAIN):
        for targets in (_EVERYWHERE, ("gfx942",)):
            cases.append(_case("forward", product, config, {units["forward"]: 1}, targets=targets))
        cases.append(_case("backward", product, config, {units["backward"]: 1}))
    for label, unit in units.items():
        cases.append(_case(label, product, UNALIGNED, {unit: 1}, aligned=False))
    for targets in (_EVERYWHERE, ("gfx942",)):
        cases.append(_case("any strides", product, UNALIGNED, {}, targets=targets, aligned=False))
        cases.append(_case("weights", kernel._gradient_kernel, PLAIN, {}, targets=targets))
    cases.append(_case("weights, unaligned", kernel._gradient_kernel, PLAIN, {}, aligned=False))
    # float32, of small models: it has no matrix units, and some pointers wait on the stack.
    for label, unit in units.items():
        cases.append(_case(label, product, UNALIGNED, {unit: 1}, "fp32", aligned=False, spills=64))
    cases.append(_case("weights", kernel._gradient_kernel, UNALIGNED, {}, "fp32", aligned=False, spills=64))
    specialized = kernel._specialized_product_kernel
    for label in units:
        cases += [_case(label, specialized, config, {"BACKWARD": label == "backward"}) for config in (SQUARE, WIDE)]
    cases.append(_case("weights", kernel._specialized_gradient_kernel, WIDE, {}))
    # float16 takes the same registers and memory: only the kind of product differs.
    cases.append(_case("forward", specialized, WIDE, {"BACKWARD": False}, "fp16"))
    cases.append(_case("weights", kernel._gradient_kernel, PLAIN, {}, "fp16"))
    return cases
