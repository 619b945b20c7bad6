"""Cases of `hadamard_quantize` for the compile gate: rows of the indexer's width, many and few, and the widest."""

from __future__ import annotations

from typing import Any

from ...common.fp8 import GROUP
from ...testing.compile_gate import CompileCase, Kind
from . import kernel
from .configs import MOST_WIDTH, options_for, rows_for

_STRIDE = "i32:16"
_SPILLS = 8  # bytes of a thread, at the call of a division that is rarely taken


def _case(label: str, function: Any, rows: int, width: int, dtype: str, targets: tuple[str, ...], **more: Any):
    arguments: dict[str, Kind] = {
        **{"x": f"*{dtype}", "out": f"*{dtype}", "codes": "*fp8e4nv", "scales": "*fp32"},
        **{"rows": "i32", "stride": _STRIDE, "strides": (_STRIDE,) * 3},
    }
    options = options_for(rows_for(rows, width), width)
    warps = options.pop("num_warps")
    return CompileCase(
        name=f"{label}, {rows} rows of {width}, {dtype}",
        kernel=function,
        arguments=arguments,
        constants={**options, **more},
        num_warps=warps,
        targets=targets,
        expect={"spills": _SPILLS if "POWER_OF_TWO" in more else 0},
    )


def compile_cases() -> list[CompileCase]:
    everywhere, cases = ("sm_90", "sm_80", "sm_100", "gfx942"), []
    for rows, width, dtype in ((2**19, GROUP, "bf16"), (64, GROUP, "bf16"), (2**19, GROUP, "fp32"), (64, 64, "bf16")):
        cases.append(_case("rotation", kernel.hadamard_kernel, rows, width, dtype, everywhere))
        quantizes = ("sm_90", "sm_100", "gfx942")
        function = kernel.hadamard_quantize_kernel
        cases.append(_case("quantization", function, rows, width, dtype, quantizes, POWER_OF_TWO=True))
    function = kernel.hadamard_quantize_kernel
    return [
        *cases,
        _case("quantization, float scales", function, 2**19, GROUP, "bf16", ("sm_90",), POWER_OF_TWO=False),
        _case("quantization", function, 2**19, MOST_WIDTH, "bf16", ("sm_90",), POWER_OF_TWO=True),
    ]
