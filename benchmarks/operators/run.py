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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepseek_kernels import dispatch

from ..core.compare import show_changes
from ..core.machine import describe_machine, gpu_state
from ..core.report import OURS, Report, Row, Samples, load_average
from ..core.timing import COLD, copies, time_calls
from .declare import Operator, Provider, Random, Shape, fits, select
from .plots import draw, require_matplotlib
from .rooflines import Ceilings, measure_ceilings
from .scales import SCALES, scale
from .tables import to_text

__all__ = ["Options", "catalogue", "failed", "main", "measure", "plan", "run"]

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


def plan(chosen: Sequence[Operator], scales: Sequence[str], sweep: bool = False) -> list[tuple[Operator, Shape]]:
    """Every operator at every shape, the most important first, then scale by scale.

    Args:
        sweep: also the shapes of the operators' sweeps, after the others of their scale.
    """
    found = [
        (rank, shape.priority, place, operator, shape)
        for rank, name in enumerate(scales)
        for operator in chosen
        for place, shape in enumerate([*operator.shapes(scale(name)), *(operator.sweeps(scale(name)) if sweep else ())])
    ]
    found.sort(key=lambda one: one[:3])
    return [(operator, shape) for *_, operator, shape in found]


# ------------------------------------------------------------------ one operator at one shape


def measure(operator: Operator, shape: Shape, device: torch.device, options: Options) -> Row:
    """Checks and times one operator; a row without results, and with the error, if ours is not right."""
    details: dict[str, Any] = {"op": operator.name, "shape": shape.name, "flops": operator.flops(shape)}
    details |= {"bytes": operator.bytes(shape), "product": operator.product, "runs": _implementation(operator.op)}
    if shape.sweep:
        details |= {"sweep": shape.sweep, "size": shape[shape.sweep]}
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
    """The command; 1 if an operator failed or, with `--compare`, got slower.

    argparse, so that it runs where nothing but torch is installed.

    Raises:
        ValueError: an unknown operator, shape or provider; no such report; figures without matplotlib.
    """
    args = _parser().parse_args(arguments)
    chosen, scales = select(_parts(args.op)), _parts(args.shape)
    if args.list:
        print(catalogue(chosen, scales or list(SCALES)))
        return 0
    scales = scales or ["v3" if args.device == "cuda" else "cpu"]
    work = plan(chosen, scales, args.sweep)
    providers = _check_providers(_parts([args.provider]), work) if args.provider else None
    # What can go wrong with files goes wrong before the minutes of measuring.
    old = Report.load(args.compare) if args.compare else None
    if old is not None and providers is not None and OURS not in providers:
        raise ValueError(f"expected {OURS} among the providers to compare, got {', '.join(providers)}")
    if args.plot:
        require_matplotlib()
    options = Options(providers, args.rounds, args.budget)
    report = run(
        work, torch.device(args.device), options, on_row=lambda row, _: print(row.name, _progress(row), file=sys.stderr)
    )
    print(to_text(report))
    what = "-".join([*scales, *_parts(args.op), *(["sweep"] if args.sweep else [])])
    path = args.out or RESULTS / f"kernels-{what}-{slug(report)}.json"
    report.save(path)
    print(f"saved {path}")
    for figure in draw(report, args.plot) if args.plot else ():
        print(f"saved {figure}")
    slower = 0
    if old is not None:
        asked = replace(
            old, rows=tuple(row for row in old.rows if _was_asked(row, _parts(args.op), scales, args.sweep))
        )
        slower = show_changes(asked, report, tolerance=args.tolerance, by=args.by)
    return 1 if failed(report) or slower else 0


def _parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    add = parser.add_argument
    add("--op", nargs="+", default=[], metavar="NAME", help="operators, or groups of them (see --list)")
    add("--shape", nargs="+", default=[], metavar="MODEL", help=f"among {', '.join(SCALES)} [v3 on a GPU, else cpu]")
    add("--sweep", action="store_true", help="also the operators' sweeps over one size")
    add("--provider", help="ours, torch (all the others) or names, with commas")
    add("--rounds", type=int, default=20, help="samples of each [20]")
    add("--budget", type=float, default=3.0, help="seconds for each [3]")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--out", type=Path, help=f"report file (default: in {RESULTS.as_posix()})")
    add("--plot", type=Path, metavar="FOLDER", help="draw the figures there (needs matplotlib)")
    add("--compare", type=Path, metavar="REPORT", help="an older report; exit with 1 if anything regressed")
    add("--tolerance", type=float, default=0.1, help="how much worse a row may be [0.1]")
    add("--by", choices=("median", "ratio"), help="compare medians, or ratios to the best built-in [by the machines]")
    add("--list", action="store_true", help="show the operators, their shapes, others and goals, and stop")
    return parser


def _parts(texts: Sequence[str]) -> list[str]:
    """Words separated by commas or by spaces."""
    return [part for text in texts for part in text.split(",") if part]


def _check_providers(names: Sequence[str], work: Sequence[tuple[Operator, Shape]]) -> tuple[str, ...]:
    known = {OURS, TORCH}.union(*(operator.providers(shape) for operator, shape in work))
    if not set(names) <= known:
        raise ValueError(f"expected providers among {', '.join(sorted(known))}, got {', '.join(names)}")
    return tuple(names)


def _was_asked(row: Row, names: Sequence[str], scales: Sequence[str], sweep: bool) -> bool:
    """Whether a row of an older report is among what this run measures, if it still exists."""
    op, shape = row.details.get("op", ""), row.details.get("shape", "")
    wanted = not names or any(fits(op, name) for name in names)
    return wanted and shape.partition(" ")[0] in scales and (sweep or "sweep" not in row.details)


def catalogue(chosen: Sequence[Operator], scales: Sequence[str]) -> str:
    """What can be timed: each operator with its contestants, then its shapes and goals, one a line."""
    text = []
    for operator in chosen:
        shapes = [shape for name in scales for shape in operator.shapes(scale(name))]
        others = list(dict.fromkeys(other for shape in shapes for other in operator.providers(shape)))
        text.append(f"{operator.name}  (others: {', '.join(others) or 'none'})")
        width = max((len(shape.name) for shape in shapes), default=0)
        for shape in shapes:
            goal = "" if shape.goal is None else f"  goal {shape.goal.describe()}"
            text.append(f"  {shape.name:{width}}{goal}".rstrip())
        for name in scales:
            curves: dict[str, list[Shape]] = {}
            for shape in operator.sweeps(scale(name)):
                curves.setdefault(shape.curve, []).append(shape)
            for curve, points in curves.items():
                over = points[0].sweep
                text.append(f"  {curve}, sweep {over} = {points[0][over]} ... {points[-1][over]}")
    return "\n".join(text)


def _progress(row: Row) -> str:
    if "error" in row.details:
        return row.details["error"]
    return ", ".join(f"{name} {samples.median:.4g} ms" for name, samples in row.results.items())


def slug(report: Report) -> str:
    """The device, as a part of a file name."""
    name = report.machine["gpu"] or f"cpu-{report.machine['threads']}-threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
