"""Cases of `indexer_scores` for the compile gate: every configuration, for DeepSeek-V3.2's 64 heads of 128 values."""

from __future__ import annotations

from typing import Any

from ...common.fp8 import GROUP
from ...testing.compile_gate import CompileCase, Kind
from . import backward, configs, kernel
from .configs import EXACT, FEW, KEY_GRADIENT, MANY, OTHERS, QUERY_GRADIENT, SMALL, Config, places_of

# Bytes of a thread: the price of a second program on each multiprocessor. Keys in FP8 take half as many addresses.
_SPILLS = 160
_NAMES = {id(config): name.lower() for name, config in vars(configs).items() if isinstance(config, Config)}


def _case(
    config: Config,
    dtype: str = "bf16",
    mask: str = "causal",
    *,
    queries: int = 64,
    heads: int = 64,
    width: int = 128,
    targets: tuple[str, ...] = ("sm_90",),
) -> CompileCase:
    fp8 = dtype == "fp8e4nv"
    arguments: dict[str, Kind] = {
        **{"q": f"*{dtype}", "keys": f"*{dtype}", "weights": "*fp32", "out": "*fp32"},
        **dict.fromkeys(["queries", "count", "chunk", "key_stride"], "i32:16"),
        **{"q_strides": ("i32:16",) * 3, "weight_strides": ("i32:16",) * 2, "mask_strides": (0, 0, 0)},
    }
    constants: dict = {"scales": None, "mask": None}
    if fp8:
        arguments |= {"scales": "*fp32"}
    if mask == "spans":
        arguments |= {"mask": "*i32"}
    if mask == "dense":
        arguments |= {"mask": "*u8", "mask_strides": ("i32",) * 3}
    constants |= {
        **{"TOKEN": width + 4 * width // GROUP if fp8 else width, "HEADS": heads, "WIDTH": width, "COLUMNS": width},
        **{"MASK": mask, **config.blocks},
        **places_of(queries, heads, config),
    }
    kind = dtype.replace("fp8e4nv", "e4m3").replace("fp", "f")
    expect: dict = {"spills": _SPILLS if config is MANY and not fp8 else 0}
    if config in (MANY, FEW):
        expect |= {"wgmma": f"m64n{config.pairs}k{32 if fp8 else 16}.f32.{kind}.{kind}"}
    return CompileCase.of_config(
        config,
        arguments,
        constants,
        name=f"{_NAMES[id(config)]}, {heads} heads, {mask}, {dtype}",
        kernel=kernel.scores_kernel,
        targets=targets,
        expect=expect,
    )


def _gradient(
    label: str, function: Any, config: Config, dtype: str = "bf16", mask: str = "causal", *, target: str = "sm_90"
) -> CompileCase:
    heads, width = 64, 128
    arguments: dict[str, Kind] = {
        **dict.fromkeys(["q", "keys", "q_grad"], f"*{dtype}"),
        **dict.fromkeys(["weights", "grad", "weights_grad", "key_grads"], "*fp32"),
        **dict.fromkeys(["queries", "count", "key_stride"], "i32:16"),
        **{"q_strides": ("i32:16",) * 3, "weight_strides": ("i32:16",) * 2, "mask_strides": (0, 0, 0)},
        **{"grad_strides": ("i32:16",) * 2, "parts": "i32"},
    }
    if mask == "spans":
        arguments |= {"mask": "*i32"}
    constants = {
        **({} if "mask" in arguments else {"mask": None}),
        **{"TOKEN": width, "HEADS": heads, "WIDTH": width, "COLUMNS": width, "MASK": mask},
        **config.blocks,
        **places_of(64, heads, config),
    }
    kind = dtype.replace("fp", "f")
    return CompileCase(
        name=f"gradient of {label}, {mask}, {dtype}",
        kernel=function,
        arguments=arguments,
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        expect={"wgmma": f"m64n64k16.f32.{kind}.{kind}"} if config is not EXACT else {},
    )


def compile_cases() -> list[CompileCase]:
    gradients = []
    for label, function, table in (
        ("queries", backward.query_gradient_kernel, QUERY_GRADIENT),
        ("keys", backward.key_gradient_kernel, KEY_GRADIENT),
    ):
        gradients += [_gradient(label, function, table[target], target=target) for target in table]
        gradients.append(_gradient(label, function, table["sm_90"], mask="spans"))
        gradients.append(_gradient(label, function, EXACT, "fp32"))
    return [
        *gradients,
        *(_case(MANY, dtype) for dtype in ("bf16", "fp16", "fp8e4nv")),
        *(_case(MANY, dtype, mask) for mask in ("spans", "dense") for dtype in ("bf16", "fp8e4nv")),
        *(_case(FEW, dtype, "spans", queries=1) for dtype in ("bf16", "fp8e4nv")),
        _case(MANY, heads=32),
        _case(MANY, "fp8e4nv", heads=12),
        _case(FEW, queries=1, targets=("sm_90", "sm_80", "sm_100")),
        _case(FEW, "fp8e4nv", queries=1, targets=("sm_90", "sm_100")),
        _case(OTHERS, targets=("sm_80", "sm_100")),
        _case(OTHERS, "fp8e4nv", targets=("sm_100",)),
        _case(SMALL, targets=("gfx942",)),
        _case(EXACT, "fp32", targets=("sm_90", "sm_80")),
    ]
