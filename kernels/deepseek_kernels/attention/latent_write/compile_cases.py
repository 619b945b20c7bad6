"""Cases of `latent_write` for the compile gate, for latents of 512 + 64."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase, Kind
from .configs import tile_for
from .kernel import write_kernel

_NUMBERS: dict[str, Kind] = {
    **{"count": "i32", "tokens": "i32", "latent": "i32:16", "pairs": "i32:16", "limit": "i32", "page": "i32"},
    **dict.fromkeys(["kv_strides", "cos_strides", "sin_strides", "out_strides"], ("i32:16", "i32:16")),
    **{"slots_strides": ("i32", 1), "eps": "fp32", "per_column": "fp32"},
}


def compile_cases() -> list[CompileCase]:
    tables: dict[str, Kind] = {"cos": "*fp32", "sin": "*fp32", "slots": "*i64"}
    kinds = [("bf16", False, False), ("bf16", True, False), ("bf16", True, True), ("fp32", True, False)]
    cases = []
    for label, tokens in (("many tokens", 8192), ("few tokens", 64), ("one token", 1)):
        tile = tile_for(tokens, 512, 64)
        # Numbers that are 1 are constants to the compiler.
        ones = dict.fromkeys(["count", "tokens", "limit"], 1) if tokens == 1 else {}
        numbers = _NUMBERS | ({"slots_strides": (1, 1)} if tokens == 1 else {})
        for dtype, fp8, paged in kinds:
            out = {"latents": "*fp8e4nv", "scales": "*fp32", "keys": "*bf16"}
            if not fp8:
                out = dict.fromkeys(out, f"*{dtype}")
            values = dict.fromkeys(["kv", "weight"], f"*{dtype}")
            everywhere = ("sm_90", "sm_100", "gfx942") if fp8 else ("sm_90", "sm_80", "sm_100", "gfx942")
            arguments = {**numbers, **tables, **values, **out}
            cases.append(
                CompileCase(
                    name=f"{label}, {dtype}{' to FP8' if fp8 else ''}{', paged' if paged else ''}",
                    kernel=write_kernel,
                    arguments={name: kind for name, kind in arguments.items() if name not in ones},
                    constants={"PAGED": paged, "FP8": fp8, **ones, **tile.blocks},
                    num_warps=tile.num_warps,
                    targets=everywhere if dtype == "bf16" and not paged and tokens > 1 else ("sm_90",),
                    options={name: value for name, value in tile.options.items() if name != "num_warps"},
                )
            )
    return cases
