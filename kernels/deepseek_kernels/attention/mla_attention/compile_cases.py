"""Cases of `mla_attention` for the compile gate: every configuration that is launched, at the published sizes."""

from __future__ import annotations

from typing import Any

from ...testing.compile_gate import CompileCase, Kind
from . import backward, kernel
from .configs import DELTA_ROWS, EXACT, FORWARD, KEYS, QUERIES, RANGE_ROWS, SPECIALIZED, Config

_INTEGERS = ["queries", "keys", "heads", "pairs", "group", "begin", "some"]
_SIZES = (128, 64, 128)
# Bytes that do not fit in registers. Three gradients of 128 keys and the products of 32 queries leave a thread none to
# spare: where spans are looked up as well, two or three values go. Where strides are no multiples of 16, which no
# published model has, every number has a pointer of its own.
_SPANS, _ODD_STRIDES = 16, 256


def _case(
    label: str,
    function,
    config: Config,
    spans: bool,
    dtype: str = "bf16",
    targets: tuple[str, ...] = ("sm_90",),
    *,
    aligned: bool = True,
    **expect,
) -> CompileCase:
    stride = "i32:16" if aligned else "i32"
    arguments: dict[str, Kind] = {
        **dict.fromkeys(["q", "kv", "grad"], (f"*{dtype}", stride, stride, stride)),
        "key": (f"*{dtype}", stride, stride),
        **dict.fromkeys(["out", "q_grad", "kv_grad"], f"*{dtype}"),
        **{"log_sum": "*fp32", "key_grads": "*fp32", "sums": ("*fp32", "*fp32"), "scale": "fp32"},
        **dict.fromkeys(_INTEGERS, "i32"),
    }
    constants: dict[str, Any] = {"SIZES": _SIZES, "TILE": config.tile}
    if spans:
        arguments |= {"span": "*i32", "ranges": "*i32"}
    else:
        constants |= {"span": None, "ranges": None}
    case = f"{label}, {'spans' if spans else 'causal'}, {dtype}"
    return CompileCase(
        name=case if aligned else f"{case}, odd strides",
        kernel=function,
        arguments=arguments,
        constants={name: value for name, value in constants.items() if name in function.arg_names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
        expect={"spills": (_SPANS if spans else 0) if aligned else _ODD_STRIDES, **expect},
    )


def compile_cases() -> list[CompileCase]:
    cases = []
    for dtype in ("bf16", "fp16"):
        kind = f"m64n64k16.f32.{dtype.replace('fp', 'f')}"
        cases.append(
            _case(
                *("forward, specialized", kernel.specialized_forward_kernel, SPECIALIZED, False, dtype),
                wgmma=kind,
                tma=True,
                warp_specialized=True,
            )
        )
    # float16 takes the same registers and memory: only the kind of product differs.
    for label, function, table, kind in (
        ("forward", kernel.forward_kernel, FORWARD, "m64n64k16.f32.bf16"),
        ("keys", backward.key_gradient_kernel, KEYS, "m64n128k16.f32.bf16"),
        ("queries", backward.query_gradient_kernel, QUERIES, "m64n128k16.f32.bf16"),
    ):
        for spans in (False, True):
            cases += [_case(label, function, table[target], spans, "bf16", (target,), wgmma=kind) for target in table]
        cases.append(_case(label, function, EXACT, True, "fp32"))
        cases.append(_case(label, function, table["sm_90"], False, aligned=False, no_mma_sync=False))
    cases.append(_small("delta", backward.delta_kernel, {"V": _SIZES[2], "ROWS": DELTA_ROWS}))
    cases.append(_small("ranges", backward.range_kernel, {"COLUMNS": KEYS["sm_90"].columns, "BLOCK": RANGE_ROWS}))
    return cases


def _small(label: str, function, constants: dict[str, int]) -> CompileCase:
    return CompileCase(
        name=label,
        kernel=function,
        arguments={
            **{"out": "*bf16", "grad": ("*bf16", "i32:16", "i32:16", "i32:16"), "delta": "*fp32"},
            **{"span": "*i32", "ranges": "*i32"},
            **dict.fromkeys(["queries", "keys", "heads"], "i32"),
        },
        constants=constants,
        num_warps=4,
        targets=tuple(FORWARD),
    )
