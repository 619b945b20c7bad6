"""REPORT.md: the table of stages beside the paper's, curves and transcripts; and results.json, for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .manifest import MANIFEST
from .published import NATURE_STAGES, NATURE_TABLE
from .recipe import Recipe

__all__ = ["write_report"]

TRANSCRIPTS = 3  # of each stage
CURVES = ("pass@1", "format", "consistency", "tokens", "reflections", "quality", "score")


def write_report(out: str | Path, recipe: Recipe | None = None) -> Path:
    """Writes `REPORT.md` and `results.json` of all stages that are done in `out`.

    Curves are drawn into `curves.png` where matplotlib is installed.

    Args:
        recipe: gives the order and the title; default: the order in which the stages were done.

    Returns:
        The report's path.

    Raises:
        ValueError: no stage is done.
    """
    out = Path(out)
    done = [path.parent.name for path in out.glob(f"*/{MANIFEST}")]
    if recipe is not None:
        names = [name for name in recipe.stages if name in done]
    else:
        names = sorted(done, key=lambda name: (out / name / MANIFEST).stat().st_mtime)
    if not names:
        raise ValueError(f"expected results of at least one stage in {out}, got none")
    stages = {name: _read(out / name) for name in names}
    parts = [f"# {'Results' if recipe is None else recipe.name}\n"]
    if recipe is not None and recipe.about:
        parts.append(f"{recipe.about}\n")
    parts.append(_models(stages) + _judges(stages) + _data(stages) + _published())
    curves = {name: _curve(stage["log"]) for name, stage in stages.items()}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if curves:
        drawn = _draw(curves, out / "curves.png")
        parts.append("## Curves\n" + ("\n![curves](curves.png)\n" if drawn else "") + _curve_tables(curves))
    parts.append(_transcripts(stages))
    results = _results(stages, curves, None if recipe is None else recipe.name)
    _write(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return _write(out / "REPORT.md", "\n".join(parts))


def _write(path: Path, text: str) -> Path:
    """Writes a file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def _results(
    stages: Mapping[str, Mapping[str, Any]], curves: Mapping[str, list[dict[str, float]]], name: str | None
) -> dict[str, Any]:
    """Returns what was measured, without transcripts and logs: small enough to be kept with a repository."""
    return {
        "recipe": name,
        "stages": {
            stage: {
                "seed": found["manifest"]["seed"],
                "metrics": found["metrics"],
                **found["timing"],
                **({"curve": curves[stage]} if stage in curves else {}),
            }
            for stage, found in stages.items()
        },
    }


def _read(folder: Path) -> dict[str, Any]:
    def value(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    def lines(name: str) -> list[Any]:
        # Not splitlines: responses may hold other characters that end lines for it, as U+2028.
        return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]

    return {
        "metrics": value("metrics.json"),
        "timing": value("timing.json"),
        "manifest": value(MANIFEST),
        "log": lines("log.jsonl"),
        "samples": lines("samples.jsonl"),
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join("" if cell is None else str(cell) for cell in row) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"


def _interval(value: Mapping[str, float], scale: float = 100.0) -> str:
    return f"{scale * value['mean']:.1f} ± {scale * value['half_width']:.1f}"


def _models(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, stage in stages.items():
        metrics = stage["metrics"]
        if "reasoning" not in metrics:
            continue
        found, general = metrics["reasoning"], metrics.get("general")
        rows.append(
            [
                name, _interval(found["pass_at_1"]), _share(found["voted"]), _share(found["strict"]),
                _share(found["formatted"]), _share(found["consistency"]), _share(found.get("summary_consistency")),
                f"{found['tokens']:.1f}",
                f"{found['reflections']:.2f}", general and _interval(general["quality"], 1.0),
                general and _share(general["refused"]), _share(metrics.get("mtp_acceptance")),
                None if "max_violation" not in metrics else f"{metrics['max_violation']:.2f}",
                f"{stage['timing']['cpu_seconds']:.0f}",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    samples = {stage["metrics"]["reasoning"]["samples"] for stage in stages.values() if "reasoning" in stage["metrics"]}
    head = [
        "stage", "pass@1", f"cons@{max(samples)}", "right and well-formed", "format", "language", "of summaries",
        "tokens", "reflections", "quality", "refused", "drafts accepted", "MaxVio", "CPU s",
    ]  # fmt: skip
    return (
        "## Stages\n\nPercentages; pass@1 with its 95 % interval over problems, at the recipe's temperature. Language: "
        "share of words in the question's, of thoughts and of summaries; quality goes from -2 to 2; MaxVio is the "
        "busiest expert's load over the mean, minus 1.\n\n" + _table(head, rows) + "\n"
    )


def _judges(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name, stage["manifest"]["fields"].get("objective", "pairwise"), _share(stage["metrics"]["accuracy"]),
         stage["metrics"]["examples"]]
        for name, stage in stages.items() if "accuracy" in stage["metrics"]
    ]  # fmt: skip
    return "## Reward models\n\n" + _table(["stage", "objective", "accuracy", "examples"], rows) + "\n" if rows else ""


def _data(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, stage in stages.items():
        metrics = stage["metrics"]
        if "samples" in metrics and "languages" in metrics:
            refused = ", ".join(f"{reason} {count}" for reason, count in sorted(metrics["samples"].items()))
            languages = ", ".join(f"{language} {share:.0%}" for language, share in metrics["languages"].items())
            rows.append([name, metrics["rows"], metrics["reasoning_rows"], languages, refused])
    if not rows:
        return ""
    return "## Collected data\n\n" + _table(["stage", "rows", "reasoning", "languages", "samples"], rows) + "\n"


def _published() -> str:
    rows = [[name, *values] for name, values in NATURE_TABLE.items()]
    return "## The paper's stages\n\nNature's table 2.\n\n" + _table(["benchmark", *NATURE_STAGES], rows) + "\n"


def _curve(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    return [
        {"step": entry["step"], **{name: entry[f"eval/{name}"] for name in CURVES if f"eval/{name}" in entry}}
        for entry in log
        if "eval/pass@1" in entry
    ]


def _curve_tables(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    parts = []
    for name, points in curves.items():
        shown = [column for column in CURVES if any(column in point for point in points)]
        rows = [[int(point["step"]), *(f"{point[c]:.3f}" if c in point else None for c in shown)] for point in points]
        parts.append(f"\n### {name}\n\n" + _table(["step", *shown], rows))
    return "".join(parts)


def _draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> bool:
    """Draws the curves; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [name for name in CURVES if any(name in point for points in curves.values() for point in points)]
    columns = min(4, len(shown))
    figure = Figure(figsize=(4 * columns, 3.2 * -(-len(shown) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flatten()
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, column in zip(grid, shown, strict=False):
        for i, (name, points) in enumerate(curves.items()):
            pairs = [(point["step"], point[column]) for point in points if column in point]
            if pairs:  # not every stage has every measure, and a stage's colour is the same in all
                axes.plot(*zip(*pairs, strict=True), marker=".", label=name, color=f"C{i}")
        axes.set(xlabel="step", title=column)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=120)
    return True


def _transcripts(stages: Mapping[str, Mapping[str, Any]]) -> str:
    parts = ["## Transcripts\n"]
    for name, stage in stages.items():
        for sample in stage["samples"][:TRANSCRIPTS]:
            verdict = {True: "right", False: "wrong"}.get(bool(sample["right"])) if "right" in sample else "kept"
            # A fence longer than any in the text.
            fence = "`" * max(3, 1 + max((len(run) for run in _fences(sample["response"])), default=0))
            shown = f"{fence}text\n{sample['response']}\n{fence}\n"
            parts.append(f"**{name}** ({verdict}): {sample['question']}\n\n{shown}")
    return "\n".join(parts)


def _fences(text: str) -> list[str]:
    return re.findall(r"`+", text)
