"""Cases of `sparse_mla` for the compile gate: every configuration that is launched, for latents of 512 + 64."""

from __future__ import annotations

from ...common.fp8 import GROUP
from ...testing.compile_gate import CompileCase, Kind
from ..mla_decode import configs
from ..mla_decode.configs import BLACKWELL, FEW, FEW_PACKED, MANY, SMALL, WIDE, Config
from . import kernel

_LATENT, _ROTATED, _TOP_K = 512, 64, 2048
# Bytes of a thread. 64 rows: half of its 255 registers are the result, and each key has an address of its own. Up to 16
# rows: the price of a second program on each multiprocessor.
_SPILLS = {id(MANY): 128, id(FEW): 128, id(FEW_PACKED): 160}
_NAMES = {id(config): name.lower() for name, config in vars(configs).items() if isinstance(config, Config)}


def _case(
    label: str,
    config: Config,
    dtype: str = "bf16",
    *,
    fp8: bool = False,
    partial: bool = False,
    targets: tuple[str, ...] = ("sm_90",),
    spills: int = 0,
) -> CompileCase:
    arguments: dict[str, Kind] = {
        **dict.fromkeys(["q", "latents", "rotated", "out"], f"*{dtype}"),
        **dict.fromkeys(["heads", "queries", "splits"], "i32"),
        **{"ids": "*i32", "count": "i32:16", "factor": "fp32", "batch_stride": "i32:16"},
        **{"q_strides": ("i32:16",) * 3, "id_strides": ("i32:16",) * 2},
    }
    if fp8:
        arguments |= {"latents": "*fp8e4nv", "scales": "*fp32", "rotated": "*bf16"}
    if partial:
        arguments |= {"out": "*fp32", "log_sums": "*fp32"}
    constants: dict = {"scales": None, "log_sums": None}
    constants |= {
        "TOKEN": _LATENT + 4 * _LATENT // GROUP + 2 * _ROTATED if fp8 else _LATENT + _ROTATED,
        **{"LATENT": _LATENT, "COLUMNS": _LATENT, "ROTATED": _ROTATED, "EXTRA": _ROTATED},
        **{"GROUPS": _LATENT // GROUP if fp8 else 0, "UNIT": 16, "SLOTS": _TOP_K, "PARTIAL": partial},
        **config.blocks,
    }
    expect: dict = {"spills": max(spills, _SPILLS.get(id(config), 0)), "no_mma_sync": config.rows >= 64}
    if config is MANY:
        kind = dtype.replace("fp", "f")
        expect |= {"wgmma": f"m64n256k16.f32.{kind}.{kind}"}
    return CompileCase.of_config(
        config,
        arguments,
        constants,
        name=f"{label}, {_NAMES[id(config)]}, {'fp8 and ' if fp8 else ''}{dtype}",
        kernel=kernel.sparse_kernel,
        targets=targets,
        expect=expect,
    )


def compile_cases() -> list[CompileCase]:
    cases = []
    for label, config, packed in (("128 heads", MANY, MANY), ("16 heads", FEW, FEW_PACKED)):
        cases += [
            _case(label, config),
            _case(label, config, "fp16"),
            _case(f"{label}, in parts", config, partial=True),
            _case(label, packed, fp8=True),
            _case(f"{label}, in parts", packed, fp8=True, partial=True),
        ]
    return [
        *cases,
        _case("16 heads", FEW, targets=("sm_80", "sm_100")),
        _case("128 heads", BLACKWELL, targets=("sm_100",)),
        _case("128 heads", BLACKWELL, fp8=True, targets=("sm_100",)),
        _case("any heads", SMALL, targets=("sm_80", "gfx942")),
        _case("any heads", SMALL, fp8=True),
        _case("any heads", WIDE, "fp32", targets=("sm_90", "sm_80")),
    ]
