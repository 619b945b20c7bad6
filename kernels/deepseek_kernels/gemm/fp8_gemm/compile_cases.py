"""What the compile gate compiles of `fp8_gemm`: every configuration that is launched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...quant.fp8_quantize.reference import GROUP
from ...testing.compile_gate import CompileCase
from . import kernel
from .configs import BAND, FEW, PLAIN, PLAIN_ROWS, SPECIALIZED, SPLITS, SUM_BLOCK, Config

DTYPES = ("bf16", "fp16", "fp32")
_ARGUMENTS = {
    **dict.fromkeys(["left", "right"], "*fp8e4nv"),
    **dict.fromkeys(["left_scale", "right_scale"], "*fp32"),
    **dict.fromkeys(["rows", "columns", "depth", "left_stride", "right_stride"], "i32"),
    **dict.fromkeys(["left_scale_row", "left_scale_group", "right_scale_row", "right_scale_group"], "i32"),
    **dict.fromkeys(["out_row", "out_column", "out_split"], "i32"),
}
# `launch.aligned` sees to the operands. The result's rows are what they are: multiples of 16 in all published models.
_OPERANDS = frozenset({"depth", "left_stride", "right_stride"})
_RESULT = frozenset({"rows", "columns", "out_row", "out_column", "out_split"})


def product_case(
    name: str,
    function,
    config: Config,
    dtype: str,
    constants: Mapping[str, int],
    *,
    arguments: Mapping[str, str] = _ARGUMENTS,
    aligned: Iterable[str] = _RESULT,
    targets: tuple[str, ...] = ("sm_90",),
    spills: int = 0,
) -> CompileCase:
    """A case of any kernel that multiplies; `constants` has the strides of 1 too: the compiler makes them constants."""
    expect = {"spills": spills, "wgmma": f"m64n{config.columns}k32.f32.e4m3.e4m3"}
    if config.specialized:
        expect |= {"tma": True, "warp_specialized": True}
    constants = {**config.blocks, "GROUP": GROUP, "BAND": BAND, "STAGES": config.num_stages, **constants}
    return CompileCase(
        name=f"{name}, {dtype}",
        kernel=function,
        arguments={name: kind for name, kind in {**arguments, "out": f"*{dtype}"}.items() if name not in constants},
        constants={name: value for name, value in constants.items() if name in function.arg_names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=_OPERANDS | frozenset(aligned),
        targets=targets,
        options={name: value for name, value in config.options.items() if name == "maxnreg"},
        expect=expect,
    )


def compile_cases() -> list[CompileCase]:
    blocks, rows = {"LEFT_BLOCK": False, "RIGHT_BLOCK": True}, {"LEFT_BLOCK": False, "RIGHT_BLOCK": False}
    # Scales of activations have stride 1 along the rows, those of a weight along the groups, but for its transpose.
    forward = {"left_scale_row": 1, "right_scale_group": 1, "out_column": 1, **blocks}
    backward = {"left_scale_row": 1, "right_scale_row": 1, "out_column": 1, **blocks}
    weights = {"left_scale_row": 1, "right_scale_row": 1, "out_column": 1, **rows}
    few = {"left_scale_group": 1, "right_scale_row": 1, "out_row": 1, "LEFT_BLOCK": True, "RIGHT_BLOCK": False}
    specialized, plain = kernel.specialized_kernel, kernel.plain_kernel
    cases = [
        product_case("odd, specialized", specialized, SPECIALIZED, "bf16", forward, aligned=()),
        product_case("odd, plain", plain, PLAIN, "bf16", forward, aligned=()),
        product_case("odd, 16 tokens", plain, FEW[0], "bf16", few, aligned=()),
        product_case("backward, specialized", specialized, SPECIALIZED, "bf16", backward),
        product_case("backward, plain", plain, PLAIN, "bf16", backward),
    ]
    for config in FEW:
        # Triton 3.6 takes a wide tile out of Blackwell's tensor memory in one piece, by way of the stack; 3.9 does not.
        spills = 512 if config.columns == 64 else 0
        name = f"{config.columns} tokens, blackwell"
        cases.append(product_case(name, plain, config, "bf16", few, targets=("sm_100",), spills=spills))
    for dtype in DTYPES:
        targets = ("sm_90", "sm_100") if dtype == "bf16" else ("sm_90",)
        cases += [
            product_case("forward, specialized", specialized, SPECIALIZED, dtype, forward),
            product_case("weights, specialized", specialized, SPECIALIZED, dtype, weights),
            product_case("forward, plain", plain, PLAIN, dtype, forward, targets=targets),
            product_case("weights, plain", plain, PLAIN_ROWS, dtype, weights, targets=targets),
        ]
        for config in FEW:
            cases.append(product_case(f"{config.columns} tokens", plain, config, dtype, few))
        for splits in SPLITS[1:]:
            cases.append(_sum_case(splits, dtype, targets))
    return cases


def _sum_case(splits: int, dtype: str, targets: tuple[str, ...]) -> CompileCase:
    return CompileCase(
        name=f"sum of {splits}, {dtype}",
        kernel=kernel.sum_kernel,
        arguments={"parts": "*fp32", "out": f"*{dtype}", "size": "i32"},
        constants={"SPLITS": splits, "BLOCK": SUM_BLOCK},
        num_warps=4,
        aligned=frozenset({"size"}),
        targets=targets,
    )
