"""The commands that typer describes, and in their list those that describe themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..core.compare import show_changes
from ..core.report import Report, Row
from ..core.tables import refresh_document, show, to_markdown

__all__ = ["app", "include"]

RESULTS = Path("benchmarks") / "results"  # of the repository root

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def include(name: str, about: str, command: Callable[[Sequence[str]], int]) -> None:
    """Lists a command that reads its own arguments."""

    def forward(context: typer.Context) -> None:
        raise typer.Exit(command(context.args))

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=about, context_settings=settings)(forward)


@app.callback()
def about() -> None:
    """Measures deepseek-arch. Run from the repository root, on a machine that does nothing else."""


@app.command()
def model(
    preset: Annotated[str, typer.Option(help="A preset name, a config.json or a checkpoint folder.")] = (
        "deepseek-v2-lite"
    ),
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers to keep.")] = 4,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[str, typer.Option(help="Parts to measure: decode,prefill,train,load.")] = "",
    contexts: Annotated[str, typer.Option(help="Cached tokens to decode at.")] = "512,8192,32768",
    prompts: Annotated[str, typer.Option(help="Prompt lengths to prefill.")] = "2048,8192",
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of the training step.")] = 2048,
    loads: Annotated[int, typer.Option(min=1, help="Times that each contestant loads the checkpoint.")] = 3,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which a slow contestant is not run again.")] = 45,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one run of transformers may take.")] = 180,
    deepseek_inference: Annotated[
        str, typer.Option(help="The folder `inference` of DeepSeek-V3's repository: decode and prefill with it too.")
    ] = "",
    profile: Annotated[bool, typer.Option(help="Also show which operators take our model's time.")] = False,
    out: Annotated[Path | None, typer.Option(help="Report file (default: in benchmarks/results).")] = None,
) -> None:
    """The whole model against transformers' native one, on the same weights and threads."""
    from ..models import whole_model as bench_model

    settings = bench_model.Settings(
        preset=preset,
        layers=layers,
        dtype=dtype,
        threads=threads,
        contexts=_integers(contexts),
        prompts=_integers(prompts),
        sequence=sequence,
        loads=loads,
        budget_s=budget,
        limit_s=limit,
        deepseek_inference=deepseek_inference,
    )
    parts = tuple(only.split(",")) if only else bench_model.PARTS
    report = bench_model.run(settings, parts, profiled=profile, on_row=_progress)
    show(report)
    path = out or RESULTS / f"model-{Path(preset).stem}-{layers}-layers-{dtype}-{threads}-threads.json"
    report.save(path)
    typer.echo(f"saved {path}")


@app.command(name="compare")
def compare_reports(
    old: Path,
    new: Path,
    tolerance: Annotated[float, typer.Option(min=0, help="How much worse a row may be.")] = 0.1,
    by: Annotated[
        str, typer.Option(help="median, or ratio (to the baseline); default: median if both ran on one machine.")
    ] = "",
) -> None:
    """Compares two reports; the exit status is 1 if a row got worse by more than the tolerance, or one is gone."""
    raise typer.Exit(
        show_changes(Report.load(old), Report.load(new), tolerance=tolerance, by=by or None, echo=typer.echo)
    )


@app.command()
def plot(report: Path, folder: Path) -> None:
    """Draws a report of `kernels`: roofline, bandwidth and sweeps, as PNG files."""
    from ..operators.plots import draw

    for path in draw(Report.load(report), folder):
        typer.echo(f"saved {path}")


@app.command()
def table(
    report: Path,
    into: Annotated[
        Path | None, typer.Option(help="Replace the table of this report in a document, instead of printing it.")
    ] = None,
) -> None:
    """Prints a report as a Markdown table."""
    loaded = Report.load(report)
    if into is None:
        typer.echo(to_markdown(loaded), nl=False)
    else:
        text = refresh_document(into.read_text(encoding="utf-8"), report.as_posix(), loaded)
        into.write_text(text, encoding="utf-8")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected numbers separated by commas, got {text!r}") from None


def _progress(row: Row) -> None:
    ratio = row.ratio()
    medians = ", ".join(f"{who} {samples.median:.4g}" for who, samples in row.results.items())
    faster = "" if ratio is None else f": {ratio:.2f}x"
    typer.echo(f"{row.name} ({row.unit}): {medians}{faster}", err=True)
