"""Operators against torch's built-ins at the shapes of published models: `python -m benchmarks kernels --help`.

A result is checked before it is timed: what is wrong has no number.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_kernels import dispatch

from .environment import describe_machine, gpu_state
from .harness import OURS, Report, Row, Samples, load_average
from .kernel_tables import to_text
from .operators import Operator, Provider, Random, Shape, operators, select
from .rooflines import Ceilings, measure_ceilings
from .scales import SCALES, scale
from .timing import COLD, copies, time_calls

__all__ = ["Options", "failed", "main", "measure", "plan", "run"]

RESULTS = Path("benchmarks") / "results"
TORCH = "torch"  # on the command line: every provider that is not ours


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        providers: names, or "torch" for all but ours; None for those that run on the device by themselves.
        rounds, budget_s: of each provider, at most.
        cold: bytes between two uses of an operand.
    """

    providers: tuple[str, ...] | None = None
    rounds: int = 20
    budget_s: float = 3.0
    cold: int = COLD

    def wants(self, name: str, provider: Provider, device: torch.device) -> bool:
        if self.providers is not None and name in self.providers:
            return True
        return device.type in provider.devices and (self.providers is None or TORCH in self.providers)


def plan(chosen: Sequence[Operator], scales: Sequence[str]) -> list[tuple[Operator, Shape]]:
    """Every operator at every shape, the most important first, then scale by scale."""
    found = [
        (rank, shape.priority, place, operator, shape)
        for rank, name in enumerate(scales)
        for operator in chosen
        for place, shape in enumerate(operator.shapes(scale(name)))
    ]
    found.sort(key=lambda one: one[:3])
    return [(operator, shape) for *_, operator, shape in found]


# ------------------------------------------------------------------ one operator at one shape


def measure(operator: Operator, shape: Shape, device: torch.device, options: Options) -> Row:
    """Checks and times one operator; a row without results, and with the error, if ours is not right."""
    details: dict[str, Any] = {"op": operator.name, "shape": shape.name, "flops": operator.flops(shape)}
    details |= {"bytes": operator.bytes(shape), "product": operator.product, "runs": _implementation(operator.op)}
    if shape.goal and device.type == "cuda":
        details["goal"] = {"must": shape.goal.must, "stretch": shape.goal.stretch}
    name = f"{operator.name} {shape.name}"
    try:
        results, more = _attempt(operator, shape, Random(device, key=name), options)
    except Exception as error:  # whatever goes wrong in one operator is this row's result, and the others get theirs
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
    """Milliseconds of everyone who is right, and the details of that."""
    device, inputs = random.device, operator.inputs(shape, random)
    everyone = {OURS: Provider(operator.ours)} | dict(operator.providers(shape))
    wanted = {name: one for name, one in everyone.items() if name == OURS or options.wants(name, one, device)}
    calls, absent, first = _check(operator, inputs, wanted)
    if options.providers is not None and OURS not in options.providers:
        del calls[OURS]
    sets = copies(inputs, operator.bytes(shape), device, options.cold)
    found = time_calls(calls, sets, device, rounds=options.rounds, budget_s=options.budget_s)
    details = {
        "absent": absent,
        "first_call_s": first,
        "copies": len(sets),
        "method": {name: timed.method for name, timed in found.items()},
        "built_in": [name for name in found if name != OURS and wanted[name].built_in],
    }
    return {name: timed.samples.map(lambda s: s * 1e3) for name, timed in found.items()}, details


def _implementation(op: str) -> str:
    """What `auto` takes for an operator on this machine."""
    return next((choice.implementation for choice in dispatch.describe() if choice.op == op), "reference")


def _check(operator: Operator, inputs: tuple[Any, ...], wanted: dict[str, Provider]):
    """Calls everyone once.

    Returns:
        those whose results are right, why the others are not there, and the seconds of each first call, in which
        kernels are compiled.
    """
    calls: dict[str, Callable[..., Any]] = {}
    absent: dict[str, str] = {}
    seconds: dict[str, float] = {}
    expected = operator.expected(*inputs)
    for name, provider in wanted.items():
        try:
            start = time.perf_counter()
            got = provider.call(*inputs)
            _synchronize()
            seconds[name] = round(time.perf_counter() - start, 3)
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
    """Leaves nothing of one row to the next: graphs, memory, and compiled code, of which torch keeps eight versions."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """An exception as one line of a report."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# ------------------------------------------------------------------ all of them


def run(
    work: Sequence[tuple[Operator, Shape]],
    device: torch.device,
    options: Options,
    *,
    on_row: Callable[[Row, Ceilings], None] = lambda row, ceilings: None,
) -> Report:
    """The ceilings, then every operator of `work`."""
    small = {"size": 64, "copied": 2**16} if options.cold == 0 else {}
    ceilings = measure_ceilings(device, rounds=options.rounds, **small)
    load, rows = load_average(), []
    for operator, shape in work:
        rows.append(measure(operator, shape, device, options))
        on_row(rows[-1], ceilings)
    settings = {"device": device.type, "rounds": options.rounds, "cold_bytes": options.cold}
    notes = (str(ceilings), f"load average before: {load}")
    return Report(
        "kernels", settings, tuple(rows), notes, machine=describe_machine(), facts={"ceilings": ceilings.to_dict()}
    )


def failed(report: Report) -> list[str]:
    """The names of the rows that have no result because ours was not right."""
    return [row.name for row in report.rows if "error" in row.details]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if an operator failed. argparse, so that it runs where nothing but torch is installed.

    Raises:
        ValueError: an unknown operator or shape.
    """
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="operators, or groups of them (see --list)")
    default = "v3" if gpu else "cpu"
    parser.add_argument("--shape", default=default, help=f"among {', '.join(SCALES)}; several with commas [{default}]")
    parser.add_argument("--provider", help="ours, torch (all the others) or names, with commas")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each [20]")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each [3]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=Path, help=f"report file (default: in {RESULTS.as_posix()})")
    parser.add_argument("--list", action="store_true", help="name the operators and stop")
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(operator.name for operator in operators()))
        return 0
    device = torch.device(args.device)
    providers = tuple(args.provider.split(",")) if args.provider else None
    work = plan(select(args.op), args.shape.split(","))
    options = Options(providers, args.rounds, args.budget)
    report = run(work, device, options, on_row=lambda row, _: print(row.name, _progress(row), file=sys.stderr))
    print(to_text(report))
    what = "" if not args.op else "-" + "-".join(args.op)
    path = args.out or RESULTS / f"kernels-{args.shape.replace(',', '-')}{what}-{slug(report)}.json"
    report.save(path)
    print(f"saved {path}")
    return 1 if failed(report) else 0


def _progress(row: Row) -> str:
    if "error" in row.details:
        return row.details["error"]
    return ", ".join(f"{name} {samples.median:.4g} ms" for name, samples in row.results.items())


def slug(report: Report) -> str:
    """The device, as a part of a file name."""
    name = report.machine["gpu"] or f"cpu-{report.machine['threads']}-threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
