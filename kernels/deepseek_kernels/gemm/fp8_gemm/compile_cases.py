"""Cases of `fp8_gemm` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...testing.compile_gate import CompileCase, Kind
from . import kernel
from .configs import FEW, PLAIN, PLAIN_ROWS, SPECIALIZED, SPLITS, SUM_BLOCK, Config

DTYPES = ("bf16", "fp16", "fp32")


def operand(scale_row: str | int = "i32", scale_group: str | int = "i32") -> tuple[Kind, ...]:
    """Returns the types of an operand; the compiler makes strides of 1 constants. `launch.aligned` sees to the rest."""
    return "*fp8e4nv", "*fp32", "i32:16", scale_row, scale_group


# Scales of activations have stride 1 along the rows, those of a weight along the groups, but for its transpose.
BY_ROWS, BY_GROUPS = operand(scale_row=1), operand(scale_group=1)


def product_case(
    name: str,
    function,
    config: Config,
    dtype: str,
    arguments: Mapping[str, Kind],
    constants: Mapping[str, Any],
    *,
    targets: tuple[str, ...] = ("sm_90",),
    spills: int = 0,
) -> CompileCase:
    """Returns a case of any kernel that multiplies."""
    expect = {"spills": spills, "wgmma": f"m64n{config.columns}k32.f32.e4m3.e4m3"}
    if config.specialized:
        expect |= {"tma": True, "warp_specialized": True}
    return CompileCase(
        name=f"{name}, {dtype}",
        kernel=function,
        arguments={**arguments, "out": f"*{dtype}"},
        constants={**config.constants, **constants},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
        options={name: value for name, value in config.options.items() if name == "maxnreg"},
        expect=expect,
    )


def _case(
    name: str,
    config: Config,
    dtype: str,
    right: tuple[Kind, ...],
    by_rows: bool = False,
    *,
    size: str = "i32:16",
    targets: tuple[str, ...] = ("sm_90",),
    spills: int = 0,
) -> CompileCase:
    """The result's rows are multiples of 16 in all published models, but need not be: `size`."""
    left: tuple[Kind, ...] = BY_ROWS
    row: Kind = size
    column: Kind = 1
    constants: dict[str, Any] = {"RIGHT_BLOCK": not by_rows}
    if not config.specialized:
        constants = {"BLOCKS": (config.swapped, not by_rows and not config.swapped)}
    if config.swapped:
        left, right, row, column = right, left, column, row
    arguments: dict[str, Kind] = {"left": left, "right": right, "sizes": (size, size, "i32:16")}
    arguments["out_strides"] = (row, column, size)
    function = kernel.specialized_kernel if config.specialized else kernel.plain_kernel
    return product_case(name, function, config, dtype, arguments, constants, targets=targets, spills=spills)


def compile_cases() -> list[CompileCase]:
    cases = [
        _case("odd, specialized", SPECIALIZED, "bf16", BY_GROUPS, size="i32"),
        _case("odd, plain", PLAIN, "bf16", BY_GROUPS, size="i32"),
        _case("odd, 16 tokens", FEW[0], "bf16", BY_GROUPS, size="i32"),
        _case("backward, specialized", SPECIALIZED, "bf16", BY_ROWS),
        _case("backward, plain", PLAIN, "bf16", BY_ROWS),
    ]
    for config in FEW:
        # Triton 3.6 takes a wide tile out of Blackwell's tensor memory in one piece, by way of the stack; 3.9 does not.
        spills = 512 if config.columns == 64 else 0
        name = f"{config.columns} tokens, blackwell"
        cases.append(_case(name, config, "bf16", BY_GROUPS, targets=("sm_100",), spills=spills))
    for dtype in DTYPES:
        targets = ("sm_90", "sm_100") if dtype == "bf16" else ("sm_90",)
        cases += [
            _case("forward, specialized", SPECIALIZED, dtype, BY_GROUPS),
            _case("weights, specialized", SPECIALIZED, dtype, BY_ROWS, True),
            _case("forward, plain", PLAIN, dtype, BY_GROUPS, targets=targets),
            _case("weights, plain", PLAIN_ROWS, dtype, BY_ROWS, True, targets=targets),
        ]
        for config in FEW:
            cases.append(_case(f"{config.columns} tokens", config, dtype, BY_GROUPS))
        for splits in SPLITS[1:]:
            cases.append(_sum_case(splits, dtype, targets))
    return cases


def _sum_case(splits: int, dtype: str, targets: tuple[str, ...]) -> CompileCase:
    return CompileCase(
        name=f"sum of {splits}, {dtype}",
        kernel=kernel.sum_kernel,
        arguments={"parts": "*fp32", "out": f"*{dtype}", "size": "i32:16"},
        constants={"SPLITS": splits, "BLOCK": SUM_BLOCK},
        num_warps=4,
        targets=targets,
    )
