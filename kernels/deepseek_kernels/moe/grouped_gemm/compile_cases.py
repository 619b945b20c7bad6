"""Cases of `grouped_gemm` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from typing import Any

from ...common import tiles
from ...testing.compile_gate import CompileCase, Kind
from . import backward, configs, kernel
from .configs import FEW, MEDIUM, PLAIN, SQUARE, UNALIGNED, WIDE, Config

_NAMES = {id(config): name.lower() for name, config in vars(configs).items() if isinstance(config, Config)}
_EVERYWHERE = ("sm_90", "sm_80", "sm_100")  # gfx942 has cases of its own, with fewer stages
# Strides of a weight: the compiler makes a stride of 1 a constant.
_FORWARD: tuple[Kind, ...] = ("i32:16", "i32:16", 1)
_BACKWARD: tuple[Kind, ...] = ("i32:16", 1, "i32:16")


def expectations(config: Config, dtype: str) -> dict[str, Any]:
    """Returns the arguments of `assert_clean` for a product; wgmma takes 64 rows, and float32 has no matrix units."""
    expect: dict[str, Any] = {"no_mma_sync": config.rows >= 64}
    if config.rows >= 64 and dtype != "fp32":
        expect["wgmma"] = f"m64n{config.columns}k16.f32.{dtype.replace('fp', 'f')}"
    return expect | ({"tma": True, "warp_specialized": True} if config.specialized else {})


def _case(
    label: str,
    function,
    config: Config,
    strides: tuple[Kind, ...] = (),
    dtype: str = "bf16",
    targets: tuple[str, ...] = ("sm_90",),
    aligned: bool = True,
    constants: dict | None = None,
    **expected,
) -> CompileCase:
    size = "i32:16" if aligned else "i32"
    return CompileCase(
        name=f"{label}, {_NAMES[id(config)]}, {dtype}",
        kernel=function,
        arguments={
            **dict.fromkeys(["x", "weight", "out", "grad"], f"*{dtype}"),
            **{"table": "*i32", "ends": "*i64", "rows": "i32", "sizes": ("i32", size, size)},
            **{"x_stride": size, "strides": (size, size)},
            "weight_strides": tuple(size if isinstance(one, str) else one for one in strides),
        },
        constants={"TILE": config.tile, **(constants or {})},
        num_warps=config.num_warps,
        num_stages=config.stages(hip=targets == ("gfx942",)),
        targets=targets,
        expect=expectations(config, dtype) | expected,
    )


def compile_cases() -> list[CompileCase]:
    table = CompileCase(
        name="tile table of 256 experts",
        kernel=tiles.tile_table_kernel,
        arguments={"ends": "*i64", "table": "*i32", **dict.fromkeys(["rows", "experts", "owners", "capacity"], "i32")},
        constants={"BLOCK": 128, "TILES": tiles.TABLE_TILES, "EXPERTS": 512},
        num_warps=4,
        targets=(*_EVERYWHERE, "gfx942"),
    )
    cases, product, gradient = [table], kernel.product_kernel, backward.gradient_kernel
    directions = {"forward": _FORWARD, "backward": _BACKWARD}
    for config in (FEW, MEDIUM, PLAIN):
        for targets in (_EVERYWHERE, ("gfx942",)):
            cases.append(_case("forward", product, config, _FORWARD, targets=targets))
        cases.append(_case("backward", product, config, _BACKWARD))
    for label, strides in directions.items():
        cases.append(_case(label, product, UNALIGNED, strides, aligned=False))
    for targets in (_EVERYWHERE, ("gfx942",)):
        cases.append(_case("any strides", product, UNALIGNED, ("i32",) * 3, targets=targets, aligned=False))
        cases.append(_case("weights", gradient, PLAIN, targets=targets))
    cases.append(_case("weights, unaligned", gradient, PLAIN, aligned=False))
    # float32, of small models: it has no matrix units, and some pointers wait on the stack.
    for label, strides in directions.items():
        cases.append(_case(label, product, UNALIGNED, strides, "fp32", aligned=False, spills=64))
    cases.append(_case("weights", gradient, UNALIGNED, dtype="fp32", aligned=False, spills=64))
    specialized = kernel.specialized_product_kernel
    for label in directions:
        constants = {"BACKWARD": label == "backward"}
        cases += [_case(label, specialized, config, constants=constants) for config in (SQUARE, WIDE)]
    cases.append(_case("weights", backward.specialized_gradient_kernel, WIDE))
    # float16 takes the same registers and memory: only the kind of product differs.
    cases.append(_case("forward", specialized, WIDE, dtype="fp16", constants={"BACKWARD": False}))
    cases.append(_case("weights", gradient, PLAIN, dtype="fp16"))
    return cases
