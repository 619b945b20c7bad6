"""Cases of `rope` for the compile gate, at the published sizes."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase, Kind
from .configs import tile_for
from .kernel import rotate_kernel


def compile_cases() -> list[CompileCase]:
    strides: dict[str, Kind] = dict.fromkeys(["x_strides", "out_strides"], ("i32:16",) * 3)
    strides["angle_strides"] = ("i32:16",) * 2
    integers = {**dict.fromkeys(["tokens", "length", "heads"], "i32"), "offset": "i32:16", **strides}
    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    # tokens, heads, dtype, backward, copy, targets
    calls = {
        "queries in place": (8192, 128, "bf16", False, False, everywhere),
        "queries": (8192, 128, "bf16", False, True, everywhere),
        "queries backward": (8192, 128, "bf16", True, True, ("sm_90",)),
        "queries of a decode": (64, 128, "bf16", False, False, ("sm_90",)),
        "keys": (8192, 1, "bf16", False, True, everywhere),
        "queries, float32": (8192, 128, "fp32", False, False, ("sm_90",)),
    }
    return [
        CompileCase(
            name=f"{label}, {dtype}" if dtype not in label else label,
            kernel=rotate_kernel,
            arguments={**dict.fromkeys(["x", "out"], f"*{dtype}"), "cos": "*fp32", "sin": "*fp32", **integers},
            constants={"PAIRS": 32, "BACKWARD": backward, "COPY": copy, **tile_for(tokens, heads, 32)},
            num_warps=4,
            targets=targets,
            options={"enable_fp_fusion": False},
        )
        for label, (tokens, heads, dtype, backward, copy, targets) in calls.items()
    ]
