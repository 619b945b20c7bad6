"""Cases of `fp8_quantize` for the compile gate: every configuration that is launched."""

from __future__ import annotations

from typing import Any

from ...common.fp8 import GROUP
from ...testing.compile_gate import CompileCase, Kind
from . import kernel
from .configs import BOTH, FEW, MANY, TRANSPOSED, Tile, block_tile

_CODES, _SCALES, _STRIDE = "*fp8e4nv", "*fp32", "i32:16"


def compile_cases() -> list[CompileCase]:
    sizes: dict[str, Kind] = dict.fromkeys(["rows", "columns"], "i32:16")
    results: dict[str, Kind] = {"codes": _CODES, "scales": _SCALES}
    transposed = results | {"codes_t": _CODES, "scales_t": _SCALES, "strides": (_STRIDE,) * 5}
    grouped = transposed | {"ends": "*i64", "experts": "i32", "strides": (_STRIDE,) * 3}
    rows = results | {"strides": (_STRIDE,) * 3}
    blocks: dict[str, Kind] = {"codes": _CODES, "scale": _SCALES, "parts": "i32", "strides": (_STRIDE,) * 2}
    # label, kernel, arguments besides x and sizes, tile, constants besides the tile's
    quantizers: list[tuple[str, Any, dict[str, Kind], Tile, dict[str, Any]]] = [
        ("many rows", kernel.rows_kernel, rows, MANY, {}),
        ("few rows", kernel.rows_kernel, rows, FEW, {}),
        ("transposed", kernel.transposing_kernel, transposed, TRANSPOSED, {"BOTH": False}),
        ("grouped", kernel.grouped_kernel, grouped, TRANSPOSED, {"EXPERTS": 256}),
        ("grouped, one expert", kernel.grouped_kernel, grouped, TRANSPOSED, {"EXPERTS": 1}),
        ("both", kernel.transposing_kernel, transposed, BOTH, {"BOTH": True}),
        ("blocks", kernel.quantize_blocks_kernel, blocks, block_tile(GROUP, GROUP, 128), {}),
    ]
    everywhere = ("sm_90", "sm_100", "gfx942")
    cases = []
    for label, function, arguments, tile, constants in quantizers:
        for dtype, power_of_two in (("bf16", False), ("bf16", True), ("fp32", False)):
            cases.append(
                CompileCase(
                    name=f"{label}, {dtype}" + (", ue8m0" if power_of_two else ""),
                    kernel=function,
                    arguments={"x": f"*{dtype}", **sizes, **arguments},
                    constants={**constants, **tile.blocks, "POWER_OF_TWO": power_of_two},
                    num_warps=tile.num_warps,
                    targets=everywhere if dtype == "bf16" and not power_of_two else ("sm_90",),
                )
            )
    tile = block_tile(GROUP, GROUP, 64)
    for dtype in ("bf16", "fp32"):
        cases.append(
            CompileCase(
                name=f"dequantize blocks, {dtype}",
                kernel=kernel.dequantize_blocks_kernel,
                arguments={
                    **{"codes": _CODES, "scale": _SCALES, "out": f"*{dtype}", **sizes, "parts": "i32"},
                    **{"codes_strides": (_STRIDE, _STRIDE), "scale_strides": ("i32",) * 3},
                    "out_strides": (_STRIDE, _STRIDE, 1),
                },
                constants=tile.blocks,
                num_warps=tile.num_warps,
                targets=everywhere if dtype == "bf16" else ("sm_90",),
            )
        )
    return cases
