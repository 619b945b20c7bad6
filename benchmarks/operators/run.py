"""Operators against torch's built-ins, at the shapes of published models.

Results are checked before they are timed: a wrong result has no number.

`--list` shows the operators with their shapes, contestants and goals; `--compare` compares with an earlier report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from ..core.compare import check_comparison, show_changes
from ..core.machine import device_slug
from ..core.report import OURS, RESULTS, Report, Row
from ..core.tables import print_progress
from .declare import Operator, Shape, fits, select
from .measuring import TORCH, Options, failed, measure_all, plan
from .plots import draw, require_matplotlib
from .scales import SCALES, scale
from .tables import kernel_table

__all__ = ["Settings", "catalogue", "main"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Operators, shapes, contestants and limits of the benchmark.

    Raises:
        ValueError: a comparison that means nothing.
    """

    op: Annotated[tuple[str, ...], "operators, or groups of them (see --list)"] = ()
    shape: Annotated[tuple[str, ...], f"among {', '.join(SCALES)} (default: v3 on a GPU, else cpu)"] = ()
    sweep: Annotated[bool, "also the operators' sweeps over one size"] = False
    provider: Annotated[tuple[str, ...], "ours, torch (all the others) or names"] = ()
    rounds: Annotated[int, "samples of each"] = 20
    budget_s: Annotated[float, "seconds for each"] = 3.0
    device: Annotated[Literal["cpu", "cuda"], "device"] = "cuda" if torch.cuda.is_available() else "cpu"
    out: Annotated[Path | None, f"report file (default: in {RESULTS.as_posix()})"] = None
    plot: Annotated[Path | None, "draw the figures into this folder (needs matplotlib)"] = None
    compare: Annotated[Path | None, "an older report; the exit status is 1 if anything regressed"] = None
    tolerance: Annotated[float, "how much worse a row may be"] = 0.1
    by: Annotated[str | None, "median, or ratio to the best built-in (default: by the machines)"] = None
    list: Annotated[bool, "show the operators, their shapes, contestants and goals, and stop"] = False

    def __post_init__(self) -> None:
        check_comparison(self.tolerance, self.by)

    @property
    def scales(self) -> tuple[str, ...]:
        """The names of the scales to measure."""
        return self.shape or (("v3",) if self.device == "cuda" else ("cpu",))


def main(settings: Settings) -> int:
    """Runs the command `kernels`; returns 1 if an operator failed or, with `--compare`, regressed.

    Raises:
        ValueError: an unknown operator, shape or provider; no such report; figures without matplotlib.
    """
    s, chosen = settings, select(settings.op)
    if s.list:
        print(catalogue(chosen, s.shape or tuple(SCALES)))
        return 0
    work = plan(chosen, s.scales, s.sweep)
    _check_providers(s.provider, work)
    # Files are opened before the minutes of measuring, so that an error comes at once.
    old = Report.load(s.compare) if s.compare else None
    if old is not None and s.provider and OURS not in s.provider:
        raise ValueError(f"expected {OURS} among the providers to compare, got {', '.join(s.provider)}")
    if s.plot:
        require_matplotlib()
    options = Options(s.provider or None, s.rounds, s.budget_s)
    report = measure_all(work, torch.device(s.device), options, on_row=print_progress)
    print(kernel_table(report).to_text())
    parts = "-".join([*s.scales, *s.op, *(["sweep"] if s.sweep else [])])
    path = s.out or RESULTS / f"kernels-{parts}-{device_slug(report.machine)}.json"
    report.save(path)
    print(f"saved {path}")
    for figure in draw(report, s.plot) if s.plot else ():
        print(f"saved {figure}")
    regressed = 0
    if old is not None:
        old = replace(old, rows=tuple(row for row in old.rows if _is_measured(row, settings)))
        regressed = show_changes(old, report, tolerance=s.tolerance, by=s.by)
    return 1 if failed(report) or regressed else 0


def _check_providers(names: Sequence[str], work: Sequence[tuple[Operator, Shape]]) -> None:
    known = {OURS, TORCH}.union(*(operator.providers(shape) for operator, shape in work))
    if not set(names) <= known:
        raise ValueError(f"expected providers among {', '.join(sorted(known))}, got {', '.join(names)}")


def _is_measured(row: Row, settings: Settings) -> bool:
    """Returns True if a run with these settings measures the row of an older report, unless it no longer exists."""
    op, shape = row.details.get("op", ""), row.details.get("shape", "")
    chosen = not settings.op or any(fits(op, name) for name in settings.op)
    return chosen and shape.partition(" ")[0] in settings.scales and (settings.sweep or "sweep" not in row.details)


def catalogue(chosen: Sequence[Operator], scales: Sequence[str]) -> str:
    """Returns the list of operators: each with its contestants, then its shapes and goals, one a line."""
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
