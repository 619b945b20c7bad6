"""Checking and timing of operators; a wrong result is never timed."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deepseek_kernels import dispatch

from ..core.machine import gpu_state, load_average
from ..core.report import OURS, Report, Row, Samples
from ..core.timing import COLD, copies, time_calls
from .declare import Operator, Provider, Shape
from .operands import Random
from .rooflines import measure_ceilings
from .scales import scale

__all__ = ["TORCH", "Options", "failed", "measure", "measure_all", "plan"]

REFERENCE = "reference"  # beside an operator's C++
TORCH = "torch"  # among the names of providers: all of them but ours


@dataclass(frozen=True)
class Options:
    """Contestants and limits of a measurement.

    Attributes:
        providers: names, or "torch" for all but ours; None for those that run on the device unless asked for.
        rounds, budget_s: of each provider, at most.
        cold: bytes between two uses of an operand.
    """

    providers: tuple[str, ...] | None = None
    rounds: int = 20
    budget_s: float = 3.0
    cold: int = COLD

    def includes(self, name: str, provider: Provider, device: torch.device) -> bool:
        if self.providers is not None and name in self.providers:
            return True
        return device.type in provider.devices and (self.providers is None or TORCH in self.providers)


def plan(chosen: Sequence[Operator], scales: Sequence[str], sweep: bool = False) -> list[tuple[Operator, Shape]]:
    """Returns every operator at every shape, scale by scale, the most important shapes first.

    Args:
        sweep: also the shapes of the operators' sweeps, after the others of their scale.
    """
    ranked = [
        (rank, shape.priority, place, operator, shape)
        for rank, name in enumerate(scales)
        for operator in chosen
        for place, shape in enumerate([*operator.shapes(scale(name)), *(operator.sweeps(scale(name)) if sweep else ())])
    ]
    ranked.sort(key=lambda one: one[:3])
    return [(operator, shape) for *_, operator, shape in ranked]


# ------------------------------------------------------------------ one operator at one shape


def measure(operator: Operator, shape: Shape, device: torch.device, options: Options) -> Row:
    """Checks and times one operator; returns a row with the error and without results if ours is wrong."""
    details: dict[str, Any] = {"op": operator.name, "shape": shape.name, "flops": operator.flops(shape)}
    details |= {"bytes": operator.bytes(shape), "product": operator.product, "runs": _implementation(operator.op)}
    if shape.sweep:
        details |= {"sweep": shape.sweep, "size": shape[shape.sweep]}
    if shape.goal and device.type == "cuda":
        details["goal"] = {"must": shape.goal.must, "stretch": shape.goal.stretch}
    name = f"{operator.name} {shape.name}"
    try:
        results, more = _attempt(operator, shape, Random(device, key=name), options)
    except Exception as error:  # a failure of one operator is the result of its row, and the others go on
        return Row(name, "ms", "lower", {}, details=details | {"error": one_line(error)})
    finally:
        _clean(device)
    if device.type == "cuda":
        more["state"] = gpu_state()
    best = min(more["built_in"], key=lambda other: results[other].median, default=None)
    return Row(name, "ms", "lower", results, baseline=best, details=details | more)


def _attempt(
    operator: Operator, shape: Shape, random: Random, options: Options
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """Milliseconds of every provider with a right result, and the details of the row."""
    device, inputs = random.device, operator.inputs(shape, random)
    providers = {name: one for name, one in operator.providers(shape).items() if options.includes(name, one, device)}
    providers = {OURS: Provider(operator.ours)} | providers
    if device.type == "cpu" and _implementation(operator.op) == "cpu":
        reference = Provider(partial(_on_reference, operator))
        providers |= {REFERENCE: reference} if options.includes(REFERENCE, reference, device) else {}
    calls, absent, first = _check(operator, inputs, providers)
    if options.providers is not None and OURS not in options.providers:
        del calls[OURS]
    sets = copies(inputs, operator.bytes(shape), device, options.cold)
    times = time_calls(calls, sets, device, rounds=options.rounds, budget_s=options.budget_s)
    details = {
        "absent": absent,
        "first_call_s": first,
        "copies": len(sets),
        "method": {name: timed.method for name, timed in times.items()},
        "built_in": [name for name in times if name != OURS and providers[name].built_in],
    }
    return {name: timed.samples.map(lambda s: s * 1e3) for name, timed in times.items()}, details


def _on_reference(operator: Operator, *inputs: Any) -> Any:
    with dispatch.use_backend(REFERENCE):
        return operator.ours(*inputs)


def _implementation(op: str) -> str:
    """The implementation that the backend `auto` chooses for an operator on this machine."""
    return next((choice.implementation for choice in dispatch.describe() if choice.op == op), "reference")


def _check(
    operator: Operator, inputs: tuple[Any, ...], providers: Mapping[str, Provider]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str], dict[str, float]]:
    """Calls every provider once.

    Returns:
        the calls whose results are right, the reasons why the others are absent, and the seconds of each first call,
        in which kernels are compiled.
    """
    calls: dict[str, Callable[..., Any]] = {}
    absent: dict[str, str] = {}
    seconds: dict[str, float] = {}
    expected = operator.expected(*inputs)
    for name, provider in providers.items():
        try:
            start = time.perf_counter()
            got = provider.call(*inputs)
            _synchronize()
            seconds[name] = float(f"{time.perf_counter() - start:.3g}")
            if provider.checked:
                operator.verify(got, expected, ours=name == OURS)
        except Exception as error:
            if name == OURS:
                raise
            absent[name] = one_line(error)
        else:
            calls[name] = provider.call
    return calls, absent, seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clean(device: torch.device) -> None:
    """Frees graphs, memory, and compiled code, of which torch keeps only eight versions, before the next row."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """Returns an exception as one line of a report."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# ------------------------------------------------------------------ all of them


def measure_all(
    work: Sequence[tuple[Operator, Shape]],
    device: torch.device,
    options: Options,
    *,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Measures the ceilings of the machine, then every operator of `work`."""
    small = {"size": 64, "copied": 2**16} if options.cold == 0 else {}
    ceilings = measure_ceilings(device, rounds=options.rounds, **small)
    load, rows = load_average(), []
    for operator, shape in work:
        rows.append(measure(operator, shape, device, options))
        on_row(rows[-1])
    settings = {"device": device.type, "rounds": options.rounds, "cold_bytes": options.cold}
    notes = (str(ceilings), f"load average before: {load}")
    return Report("kernels", settings, tuple(rows), notes, facts={"ceilings": ceilings.to_dict()})


def failed(report: Report) -> list[str]:
    """Returns the names of the rows without a result because ours was wrong."""
    return [row.name for row in report.rows if "error" in row.details]
