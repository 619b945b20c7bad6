"""Cases of `mla_decode` for the compile gate: every configuration that is launched, for latents of 512 + 64."""

from __future__ import annotations

from ...common.fp8 import GROUP
from ...testing.compile_gate import CompileCase, Kind
from . import configs, kernel
from .configs import BLACKWELL, FEW, FEW_PACKED, MANY, SMALL, SUM_COLUMNS, SUM_ROWS, SUM_STEP, WIDE, Config

_LATENT, _ROTATED, _PAGE = 512, 64, 64
_SIZES = ["rows", "heads", "queries", "keys", "splits"]
# Bytes of a thread, all of them but for a few around the loop. 64 rows: half of its 255 registers are the result, and
# keys by pointers need addresses too. Up to 16 rows: the price of a second program on each multiprocessor.
_SPILLS = {id(MANY): 64, id(FEW): 128, id(FEW_PACKED): 160}
_NAMES = {id(config): name.lower() for name, config in vars(configs).items() if isinstance(config, Config)}


def _case(
    label: str,
    config: Config,
    dtype: str = "bf16",
    *,
    fp8: bool = False,
    page: int = 0,
    mask: str = "causal",
    partial: bool = False,
    targets: tuple[str, ...] = ("sm_90",),
    spills: int = 0,
) -> CompileCase:
    arguments: dict[str, Kind] = dict.fromkeys(["q", "latents", "rotated", "out"], f"*{dtype}")
    arguments |= dict.fromkeys(_SIZES, "i32") | {"factor": "fp32"}
    arguments |= {"batch_stride": "i32:16", "q_strides": ("i32:16",) * 3, "mask_strides": (0, 0, 0)}
    constants: dict = dict.fromkeys(["scales", "mask", "table", "lengths", "log_sums"])  # None, where they are not used
    constants |= {"table_stride": 0}
    if fp8:
        arguments |= {"latents": "*fp8e4nv", "scales": "*fp32", "rotated": "*bf16"}
    if page:
        arguments |= {"table": "*i32", "table_stride": "i32", "lengths": "*i32"}
    if mask == "spans":
        arguments |= {"mask": "*i32"}
    if mask == "dense":
        arguments |= {"mask": "*u8", "mask_strides": ("i32",) * 3}
    if partial:
        arguments |= {"out": "*fp32", "log_sums": "*fp32"}
    constants |= {
        "TOKEN": _LATENT + 4 * _LATENT // GROUP + 2 * _ROTATED if fp8 else _LATENT + _ROTATED,
        **{"LATENT": _LATENT, "COLUMNS": _LATENT, "ROTATED": _ROTATED, "EXTRA": _ROTATED},
        **{"GROUPS": _LATENT // GROUP if fp8 else 0, "MASK": mask, "PAGE": page, "UNIT": 16},
        **{"BULK": config.bulk, "PARTIAL": partial},
        **config.blocks,
    }
    return CompileCase.of_config(
        config,
        arguments,
        constants,
        name=f"{label}, {_NAMES[id(config)]}, {'fp8 and ' if fp8 else ''}{dtype}",
        kernel=kernel.decode_kernel,
        targets=targets,
        expect=_expect(config, dtype, fp8 or bool(page), max(spills, _SPILLS.get(id(config), 0))),
    )


def _expect(config: Config, dtype: str, by_pointers: bool, spills: int) -> dict:
    expect: dict = {"spills": spills, "no_mma_sync": config.rows >= 64}
    if config is MANY:
        kind = dtype.replace("fp", "f")
        expect |= {"wgmma": f"m64n256k16.f32.{kind}.{kind}", "tma": not by_pointers}
    return expect


def _sum_case(dtype: str, splits: int, targets: tuple[str, ...]) -> CompileCase:
    return CompileCase(
        name=f"sum of up to {splits}, {dtype}",
        kernel=kernel.sum_kernel,
        arguments={"parts": "*fp32", "log_sums": "*fp32", "out": f"*{dtype}", "rows": "i32", "splits": "i32"},
        constants={"LATENT": _LATENT, "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS, "SPLITS": splits, "STEP": SUM_STEP},
        num_warps=4,
        targets=targets,
    )


def compile_cases() -> list[CompileCase]:
    cases = []
    for label, config, packed in (("128 heads", MANY, MANY), ("16 heads", FEW, FEW_PACKED)):
        cases += [
            _case(label, config),
            _case(label, config, "fp16"),
            _case(f"{label}, in parts", config, partial=True),
            _case(f"{label}, pages", config, page=_PAGE),
            _case(f"{label}, pages, in parts", config, page=_PAGE, partial=True),
            _case(f"{label}, spans", config, mask="spans"),
            _case(f"{label}, dense mask", config, mask="dense"),
            _case(label, packed, fp8=True),
            _case(label, packed, "fp16", fp8=True),
            _case(f"{label}, in parts", packed, fp8=True, partial=True),
            _case(f"{label}, spans", packed, fp8=True, mask="spans"),
            _case(f"{label}, pages", packed, fp8=True, page=_PAGE),
            _case(f"{label}, pages, in parts", packed, fp8=True, page=_PAGE, partial=True),
        ]
    cases += [
        _case("16 heads", FEW, targets=("sm_80", "sm_100")),
        _case("128 heads", BLACKWELL, targets=("sm_100",), spills=64),
        _case("128 heads", BLACKWELL, fp8=True, targets=("sm_100",), spills=64),
        _case("any heads", SMALL, targets=("sm_80", "gfx942")),
        _case("any heads", SMALL, fp8=True),
        _case("any heads", WIDE, "fp32", targets=("sm_90", "sm_80"), spills=128),
        *(_sum_case(dtype, splits, ("sm_90",)) for dtype in ("bf16", "fp32") for splits in (2, 128)),
        _sum_case("bf16", 128, ("sm_80", "sm_100", "gfx942")),
    ]
    return cases
