"""Cases of `topk_select` for the compile gate: 2048 keys of rows of several lengths, and the programs of long ones."""

from __future__ import annotations

from ...common.host import power_of_two
from ...testing.compile_gate import CompileCase, Kind
from . import kernel
from .configs import LEAST, MOST, block_for, warps_for

_TOP_K = 2048


def _case(
    label: str,
    keys: int,
    mask: str = "causal",
    *,
    merging: bool = False,
    partial: bool = False,
    targets: tuple[str, ...] = ("sm_90",),
) -> CompileCase:
    arguments: dict[str, Kind] = {
        **{"scores": "*fp32", "out": "*i32", "strides": ("i32:16", "i32:16"), "mask_strides": (0, 0, 0)},
        **dict.fromkeys(["first_row", "queries"], "i32"),
        **dict.fromkeys(["count", "chunk", "top_k"], "i32:16"),
    }
    if merging:
        arguments |= {"indices": "*i32"}
    if partial:
        arguments |= {"kept": "*fp32"}
    if mask == "spans":
        arguments |= {"mask": "*i32"}
    if mask == "dense":
        arguments |= {"mask": "*u8", "mask_strides": ("i32",) * 3}
    block = block_for(keys)
    constants: dict = {"indices": None, "kept": None, "mask": None, "MASK": mask}
    constants |= {"BLOCK": block, "SLOTS": power_of_two(_TOP_K), "LEAST": LEAST}
    return CompileCase(
        name=f"{label}, {mask}",
        kernel=kernel.select_kernel,
        arguments=arguments,
        constants={name: value for name, value in constants.items() if name not in arguments},
        num_warps=warps_for(block),
        targets=targets,
    )


def compile_cases() -> list[CompileCase]:
    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    return [
        _case("whole row", MOST, targets=everywhere),
        *(_case("whole row", MOST, mask) for mask in ("spans", "dense")),
        *(_case("part of a long row", MOST, mask, partial=True) for mask in ("spans", "dense")),
        _case("parts of a long row", MOST, "none", merging=True, targets=everywhere),
        _case("parts in between", MOST, "none", merging=True, partial=True),
        _case("300 keys", 300),
    ]
