"""What the compile gate compiles of `fp8_grouped_gemm`: every configuration that is launched."""

from __future__ import annotations

from ...quant.fp8_quantize.reference import GROUP
from ...testing.compile_gate import CompileCase
from ..fp8_gemm.compile_cases import DTYPES, product_case
from ..fp8_gemm.configs import FEW, PLAIN, PLAIN_ROWS, SPECIALIZED
from . import kernel

_CODES, _SCALES = ("x", "weight", "grad"), ("x_scale", "weight_scale", "grad_scale")
_SIZES = ("rows", "experts", "width", "height", "depth", "part_width", "part_blocks", "column_tiles")
_STRIDES = tuple(f"{name}_{stride}" for name in _SCALES for stride in ("expert", "row", "group"))
_ARGUMENTS = {
    **dict.fromkeys(_CODES, "*fp8e4nv"),
    **dict.fromkeys(_SCALES, "*fp32"),
    **dict.fromkeys(("table", "starts"), "*i32"),
    **dict.fromkeys((*_SIZES, *_STRIDES, *(f"{name}_stride" for name in _CODES)), "i32"),
}
_ROWS = {"depth", "x_stride", "weight_stride", "grad_stride"}  # of operands: `aligned` sees to them
_RESULT = _ROWS | {"width", "height", "part_width"}


def compile_cases() -> list[CompileCase]:
    forward = {"x_scale_row": 1, "weight_scale_group": 1, "SWAPPED": False}
    backward = {"x_scale_row": 1, "weight_scale_row": 1, "SWAPPED": False}
    few = {"x_scale_row": 1, "weight_scale_group": 1, "SWAPPED": True}
    weights = {"grad_scale_row": 1, "x_scale_row": 1}
    plain, specialized = kernel.plain_kernel, kernel.specialized_kernel
    plain_gradient, specialized_gradient = kernel.plain_gradient_kernel, kernel.specialized_gradient_kernel

    def case(name, function, config, dtype, constants, aligned=_RESULT, **more) -> CompileCase:
        return product_case(name, function, config, dtype, constants, arguments=_ARGUMENTS, aligned=aligned, **more)

    cases = [
        CompileCase(
            name="starts of 256 experts",
            kernel=kernel.starts_kernel,
            arguments={"ends": "*i64", "starts": "*i32", "experts": "i32", "capacity": "i32"},
            constants={"EXPERTS": 256, "GROUP": GROUP},
            num_warps=4,
            targets=("sm_90", "sm_100"),
        ),
        case("odd, specialized", specialized, SPECIALIZED, "bf16", forward, _ROWS),
        # Four registers wait on the stack while the loop runs; with one more each, two programs would fit, not three.
        case("odd, plain", plain, PLAIN, "bf16", forward, _ROWS, spills=16),
        case("odd, 16 tokens", plain, FEW[0], "bf16", few, _ROWS),
        case("backward, specialized", specialized, SPECIALIZED, "bf16", backward),
        case("backward, plain", plain, PLAIN, "bf16", backward),
    ]
    for dtype in DTYPES:
        targets = ("sm_90", "sm_100") if dtype == "bf16" else ("sm_90",)
        cases += [
            case("forward, specialized", specialized, SPECIALIZED, dtype, forward),
            case("forward, plain", plain, PLAIN, dtype, forward, targets=targets),
            case("weights, specialized", specialized_gradient, SPECIALIZED, dtype, weights),
            case("weights, plain", plain_gradient, PLAIN_ROWS, dtype, weights, targets=targets),
            *(case(f"{config.columns} tokens", plain, config, dtype, few) for config in FEW),
        ]
    return cases
