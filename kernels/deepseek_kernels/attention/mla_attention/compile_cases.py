"""What the compile gate compiles of `mla_attention`: every configuration that is launched, at the published sizes."""

from __future__ import annotations

from ...testing.compile_gate import CompileCase
from . import backward as gradients
from . import kernel
from .configs import EXACT, FORWARD, KEYS, QUERIES, SPECIALIZED, Config

_INTEGERS = ["queries", "keys", "heads", "pairs", "group", "begin", "some"]
_STRIDES = [f"{x}_{name}" for x in ("q", "kv", "grad") for name in ("batch", "row", "head")] + ["key_batch", "key_row"]
_SIZES = {"P": 128, "R": 64, "V": 128, "BLOCK_P": 128, "BLOCK_R": 64, "BLOCK_V": 128}
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
    pointers = dict.fromkeys(["q", "kv", "key", "out", "grad", "q_grad", "kv_grad"], f"*{dtype}")
    pointers |= dict.fromkeys(["log_sum", "delta", "key_grads"], "*fp32")
    pointers |= dict.fromkeys(["span", "ranges"], "*i32") if spans else {}
    constants = {**_SIZES, **config.blocks} | ({} if spans else {"span": None, "ranges": None})
    case = f"{label}, {'spans' if spans else 'causal'}, {dtype}"
    return CompileCase(
        name=case if aligned else f"{case}, odd strides",
        kernel=function,
        arguments=pointers | dict.fromkeys([*_INTEGERS, *_STRIDES], "i32") | {"scale": "fp32"},
        constants={name: value for name, value in constants.items() if name in function.arg_names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=frozenset(_STRIDES if aligned else ()),
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
        ("keys", gradients.key_gradient_kernel, KEYS, "m64n128k16.f32.bf16"),
        ("queries", gradients.query_gradient_kernel, QUERIES, "m64n128k16.f32.bf16"),
    ):
        for spans in (False, True):
            cases += [_case(label, function, table[target], spans, "bf16", (target,), wgmma=kind) for target in table]
        cases.append(_case(label, function, EXACT, True, "fp32"))
        cases.append(_case(label, function, table["sm_90"], False, aligned=False, no_mma_sync=False))
    targets = tuple(FORWARD)
    cases.append(_small("delta", gradients.delta_kernel, {"V": 128, "BLOCK_V": 128, "ROWS": 64}, targets))
    cases.append(_small("ranges", gradients.range_kernel, {"COLUMNS": 128, "BLOCK": 1024}, targets))
    return cases


def _small(label: str, function, constants: dict[str, int], targets: tuple[str, ...]) -> CompileCase:
    pointers = dict.fromkeys(["out", "grad"], "*bf16") | {"delta": "*fp32", "span": "*i32", "ranges": "*i32"}
    return CompileCase(
        name=label,
        kernel=function,
        arguments=pointers | dict.fromkeys([*_INTEGERS, *_STRIDES], "i32"),
        constants=constants,
        num_warps=4,
        aligned=frozenset(_STRIDES),
        targets=targets,
    )
