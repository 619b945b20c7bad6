"""Cases of `fp8_grouped_gemm` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase, Kind
from ..fp8_gemm.compile_cases import BY_GROUPS, BY_ROWS, DTYPES, product_case
from ..fp8_gemm.configs import FEW, PLAIN, PLAIN_ROWS, SPECIALIZED, Config
from . import backward, kernel


def _case(
    name: str,
    config: Config,
    dtype: str,
    weight: tuple[Kind, ...] = BY_GROUPS,
    size: str = "i32:16",
    targets: tuple[str, ...] = ("sm_90",),
    spills: int = 0,
) -> CompileCase:
    arguments: dict[str, Kind] = {
        **{"x": BY_ROWS, "weight": weight, "table": "*i32", "rows": "i32", "expert_stride": "i32"},
        **{"sizes": ("i32", size, "i32:16"), "parts": (size, "i32", "i32")},
    }
    function = kernel.specialized_kernel if config.specialized else kernel.plain_kernel
    constants = {} if config.specialized else {"SWAPPED": config.swapped}
    return product_case(name, function, config, dtype, arguments, constants, targets=targets, spills=spills)


def _gradient_case(name: str, config: Config, dtype: str, targets: tuple[str, ...] = ("sm_90",)) -> CompileCase:
    arguments: dict[str, Kind] = {
        **{"grad": BY_ROWS, "x": BY_ROWS, "starts": "*i32", "experts": "i32"},
        "sizes": ("i32:16", "i32:16", "i32:16"),
    }
    function = backward.specialized_gradient_kernel if config.specialized else backward.plain_gradient_kernel
    return product_case(name, function, config, dtype, arguments, {}, targets=targets)


def compile_cases() -> list[CompileCase]:
    cases = [
        CompileCase(
            name="starts of 256 experts",
            kernel=backward.starts_kernel,
            arguments={"ends": "*i64", "starts": "*i32", "experts": "i32", "capacity": "i32"},
            constants={"EXPERTS": 256},
            num_warps=4,
            targets=("sm_90", "sm_100"),
        ),
        _case("odd, specialized", SPECIALIZED, "bf16", size="i32"),
        # Four registers wait on the stack while the loop runs; with one more each, two programs would fit, not three.
        _case("odd, plain", PLAIN, "bf16", size="i32", spills=16),
        _case("odd, 16 tokens", FEW[0], "bf16", size="i32"),
        _case("backward, specialized", SPECIALIZED, "bf16", BY_ROWS),
        _case("backward, plain", PLAIN, "bf16", BY_ROWS),
    ]
    for dtype in DTYPES:
        targets = ("sm_90", "sm_100") if dtype == "bf16" else ("sm_90",)
        cases += [
            _case("forward, specialized", SPECIALIZED, dtype),
            _case("forward, plain", PLAIN, dtype, targets=targets),
            _gradient_case("weights, specialized", SPECIALIZED, dtype),
            _gradient_case("weights, plain", PLAIN_ROWS, dtype, targets=targets),
            *(_case(f"{config.columns} tokens", config, dtype) for config in FEW),
        ]
    return cases
