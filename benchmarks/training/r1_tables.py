"""Prints the tables of the R1 recipe's committed results as Markdown, or puts them into the documents.

`box.json` is a run's `results.json`; `box-seeds.json` and `box-students.json` have those of other seeds by their names.
In a document the tables stand between `<!-- begin r1 stages -->` and `<!-- end r1 stages -->`, and the same lines of
`r1 claims`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..core.tables import Table

__all__ = ["FOLDER", "Settings", "claims_table", "load_results", "main", "refresh", "stage_table"]

FOLDER = Path(__file__).resolve().parents[1] / "results" / "r1"
_NAMES = {
    "base": "base",
    "zero": "R1-Zero",
    "cold_start": "cold start",
    "reason": "reasoning RL",
    "reason_free": "from an unfiltered start, without the language reward",
    "finetune": "second fine-tuning",
    "align": "R1: alignment RL",
    "hacked": "a naive judge's preferences, from the start",
    "student": "dense student (Qwen2)",
    "distill": "student distilled",
    "student_rl": "student with RL",
}
Stages = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """The results, and the document that shows them."""

    results: Annotated[Path, "the folder with box.json, box-seeds.json and, if there is one, box-students.json"] = (
        FOLDER
    )
    into: Annotated[Path | None, "replace the tables that a document has, instead of printing them"] = None


def load_results(folder: Path) -> tuple[Stages, dict[str, Stages], dict[str, Stages]]:
    """Returns the stages of the run, and by seed those of other runs and, where there are any, of other students."""

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        return found

    students = read("box-students.json")["runs"] if (folder / "box-students.json").is_file() else {}
    return read("box.json")["stages"], read("box-seeds.json")["runs"], students


def stage_table(stages: Stages) -> Table:
    """Returns the measures of each stage that has a policy."""
    rows: list[tuple[str, ...]] = [
        ("stage", "pass@1", "form", "language", "tokens", "quality", "refused", "CPU s"),
    ]
    for name, label in _NAMES.items():
        metrics = stages[name]["metrics"]
        found, general = metrics["reasoning"], metrics.get("general")
        quality = f"{general['quality']['mean']:.2f}" if general else ""
        rows.append(
            (
                label,
                f"{_pass(stages, name):.1f} ± {100 * found['pass_at_1']['half_width']:.1f}",
                f"{100 * found['formatted']:.0f}",
                f"{100 * found['consistency']:.0f}",
                f"{found['tokens']:.0f}",
                quality,
                f"{100 * general['refused']:.0f}" if general else "",
                f"{stages[name]['cpu_seconds']:.0f}",
            )
        )
    return Table("", rows, labels=1, remarks=())


def claims_table(box: Stages, seeds: Mapping[str, Stages], students: Mapping[str, Stages]) -> Table:
    """Returns what the recipe is to reach beside what it reached; several seeds in the order of their names."""
    rows = [("claim", "figure", "aim"), *_reinforcement(box, seeds)]
    rows += [*_cold_start(box, list(seeds), list(seeds.values())), *_later(box)]
    return Table("", [*rows, *_students([box, *students.values()])], labels=3, remarks=())


def _reinforcement(box: Stages, seeds: Mapping[str, Stages]) -> list[tuple[str, str, str]]:
    short = list(seeds.values())
    before, after = (_measure(box, name) for name in ("base", "zero"))
    rises = [f"{_pass(run, 'base'):.1f} to {_pass(run, 'zero'):.1f} %" for run in short]
    scores = ", ".join(f"{_z(run):.0f}" for run in short)
    tokens = f"x {after['tokens'] / before['tokens']:.2f}"
    return [
        (
            "base: right single steps under a forced list; pass@1",
            f"{100 * box['base']['metrics']['steps']:.0f} %; {_pass(box, 'base'):.1f} %",
            "90 %; 10 to 25 %",
        ),
        (f"R1-Zero, 60 steps, {', '.join(seeds)}: pass@1", f"{', '.join(rises)} (z = {scores})", "+20 points"),
        (
            f"R1-Zero, {box['zero']['metrics']['steps_trained']} steps, seed 0: pass@1",
            f"{_pass(box, 'base'):.1f} to {_pass(box, 'zero'):.1f} % (z = {_z(box):.0f})",
            "+30 points",
        ),
        (
            "... tokens of a response; language",
            f"{tokens}; {before['consistency']:.2f} to {after['consistency']:.2f}",
            "x 1.5; not better",
        ),
    ]


def _cold_start(box: Stages, names: list[str], runs: list[Stages]) -> list[tuple[str, str, str]]:
    points = ", ".join(f"{_pass(run, 'zero') - _pass(run, 'cold_start'):.1f}" for run in runs)
    forms = ", ".join(f"{100 * _measure(run, 'cold_start')['formatted']:.0f} %" for run in runs)
    languages = ", ".join(f"{_measure(run, 'cold_start')['consistency']:.2f}" for run in runs)
    steps = box["cold_start"]["metrics"]["steps_trained"]
    return [
        (f"cold start, {steps} steps, {', '.join(names)}: points of pass@1 below R1-Zero", points, "10 to 50"),
        ("... form", forms, "90 %"),
        ("... language", languages, "0.98"),
        (
            f"reasoning RL, {box['reason']['metrics']['steps_trained']} steps: pass@1 above R1-Zero; language",
            f"{_gain(box, 'zero', 'reason')} points; {_measure(box, 'reason')['consistency']:.2f}",
            "-5; 0.98",
        ),
        (
            "the same from an unfiltered cold start, without the language reward: language",
            " to ".join(f"{_measure(box, name)['consistency']:.2f}" for name in ("mixed_start", "reason_free")),
            "at most 0.70",
        ),
    ]


def _later(box: Stages) -> list[tuple[str, str, str]]:
    data = box["data"]["metrics"]
    before, after = (box[name]["metrics"]["general"] for name in ("finetune", "align"))
    pairs, harm = (100 * box[name]["metrics"]["accuracy"] for name in ("helpful", "harmless"))
    curve = box["hacked"]["curve"]
    steps = ", ".join(f"{point['step']}" for point in curve)
    return [
        (
            f"second fine-tuning on {data['reasoning_rows']:,} + {data['rows'] - data['reasoning_rows']} rows: "
            "pass@1 above reasoning RL",
            f"{_gain(box, 'reason', 'finetune')} points",
            "-2",
        ),
        (
            "reward models, 5 % wrong labels: pairs in the right order; harm told",
            f"{pairs:.1f} %; {harm:.0f} %",
            "95 %",
        ),
        (
            f"alignment, {box['align']['metrics']['steps_trained']} steps: quality; refusals; pass@1",
            f"{before['quality']['mean']:.2f} to {after['quality']['mean']:.2f}; {100 * after['refused']:.0f} %; "
            f"{_gain(box, 'finetune', 'align')} points",
            "+0.5; 95 %; -2",
        ),
        (
            f"a naive reward model from the start, steps {steps}: its score",
            ", ".join(f"{point['score']:.2f}" for point in curve),
            "rises",
        ),
        ("... and the true quality", ", ".join(f"{point['quality']:.2f}" for point in curve), "falls"),
    ]


def _students(runs: list[Stages]) -> list[tuple[str, str, str]]:
    pairs = [f"{_pass(run, 'distill'):.1f}, {_pass(run, 'student_rl'):.1f} %" for run in runs]
    costs = [" and ".join(f"{run[name]['cpu_seconds']:.0f}" for name in ("distill", "student_rl")) for run in runs]
    label = f"student distilled, and with RL ({'; '.join(costs)} CPU s): pass@1"
    return [(label, "; ".join(pairs), "25 points apart")]


def _measure(stages: Stages, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = stages[name]["metrics"]["reasoning"]
    return found


def _pass(stages: Stages, name: str) -> float:
    return 100 * float(_measure(stages, name)["pass_at_1"]["mean"])


def _gain(stages: Stages, first: str, second: str) -> str:
    return f"{_pass(stages, second) - _pass(stages, first):+.1f}"


def _z(stages: Stages) -> float:
    """Returns the rise from the base to R1-Zero over its standard error."""
    before, after = (_measure(stages, name)["pass_at_1"] for name in ("base", "zero"))
    error = math.hypot(before["half_width"], after["half_width"]) / 1.96
    return float((after["mean"] - before["mean"]) / error)


def refresh(text: str, tables: Mapping[str, Table]) -> str:
    """Returns a document with those of the tables that it has places for.

    Raises:
        ValueError: it has none.
    """
    found = False
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if opened and closed:
            found, text = True, f"{before}{begin}{table.to_markdown().strip()}\n{end}{after}"
    if not found:
        raise ValueError(f"expected a document with lines as <!-- begin {next(iter(tables))} -->, got none")
    return text


def main(settings: Settings) -> int:
    """Runs the command `r1-table`."""
    box, seeds, students = load_results(settings.results)
    tables = {"r1 stages": stage_table(box), "r1 claims": claims_table(box, seeds, students)}
    if settings.into is None:
        print("\n".join(table.to_markdown() for table in tables.values()), end="")
    else:
        text = settings.into.read_text(encoding="utf-8")
        settings.into.write_text(refresh(text, tables), encoding="utf-8")
    return 0
