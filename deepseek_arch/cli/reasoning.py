"""Commands of R1's training recipe: `deepseek-arch r1 ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Checkpoint, Device, Json, print_json

__all__ = ["r1"]

r1 = typer.Typer(
    help="DeepSeek-R1's training recipe: from a base model to R1 and its distilled students.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str,
    typer.Argument(help="A recipe (`deepseek-arch r1 recipes` lists them), or a folder with a pipeline.yaml.",
                   show_default=False),
]  # fmt: skip
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field: zero.max_steps=50; repeatable.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Of every stage.", show_default="the recipe's")]
Progress = Annotated[bool, typer.Option("--progress/--quiet", help="Draw bars while training.")]


@r1.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes, their stages, and what they are for."""
    from ..r1.pipeline import load_recipe
    from ..r1.pipeline import recipes as names

    loaded = [load_recipe(name) for name in names()]
    if as_json:
        print_json([{"name": one.name, "about": one.about, "stages": list(one.stages)} for one in loaded])
    else:
        for one in loaded:
            typer.echo(f"{one.name}: {one.about}\n    {', '.join(one.stages)}")


@r1.command()
def run(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="runs/RECIPE")] = None,
    until: Annotated[str | None, typer.Option(help="Last stage to run.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage to run; those before are done.")] = None,
    changes: Changes = None,
    seed: Seed = None,
    progress: Progress = True,
) -> None:
    """Run all stages of a recipe; the same command goes on after an interruption, whatever it was."""
    from ..r1.pipeline import load_recipe
    from ..r1.pipeline import run as run_recipe

    loaded = load_recipe(recipe, changes or (), seed)
    folder = out or Path("runs") / loaded.name
    run_recipe(loaded, folder, until, first, progress, typer.echo)
    typer.echo(f"report: {folder / 'REPORT.md'}")


@r1.command()
def stage(
    name: Annotated[str, typer.Argument(help="Name of the stage.", show_default=False)],
    config: Annotated[Path, typer.Option(help="Its file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: max_steps=50; repeatable.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    progress: Progress = True,
) -> None:
    """Run one stage from its file; on several processes: accelerate launch -m deepseek_arch.r1 NAME --config ..."""
    from ..r1.pipeline.single import run_file

    typer.echo(run_file(name, config, out, changes or (), seed, progress))


@r1.command(name="eval")
def evaluate_(
    checkpoint: Checkpoint,
    task: Annotated[str, typer.Option(help="A source of problems: chains, gym, jsonl, dataset.")] = "chains",
    option: Annotated[
        list[str] | None, typer.Option(help="Of the source: nodes=6, path=problems.jsonl; repeatable.")
    ] = None,
    template: Annotated[str, typer.Option(help="Form of the responses.")] = "r1-marks",
    problems: Annotated[int, typer.Option(min=1, help="Problems of the test split.")] = 400,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a response.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the best tokens that sum to this.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of problems and samples.")] = 999,
    device: Device = "cpu",
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of the lm-eval library instead, as gsm8k,aime24.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint: pass@1 with its interval, votes, form, language, length, reflections."""
    from ..r1.pipeline.single import evaluate_checkpoint, evaluate_with_lm_eval

    if lm_eval is not None:
        found: Any = evaluate_with_lm_eval(checkpoint, lm_eval.split(","), device)
        print_json(found)
        return
    settings = {
        "problems": problems, "samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature,
        "top_p": top_p, "seed": seed,
    }  # fmt: skip
    found = evaluate_checkpoint(checkpoint, {"name": task, **_options(option)}, template, settings, device)
    if as_json:
        print_json(found)
        return
    reasoning = found["reasoning"]
    mean = reasoning["pass_at_1"]
    typer.echo(f"pass@1       {100 * mean['mean']:.1f} ± {100 * mean['half_width']:.1f} % of {mean['count']} problems")
    typer.echo(f"cons@{samples:<7} {100 * reasoning['voted']:.1f} %")
    typer.echo(f"well-formed  {100 * reasoning['formatted']:.1f} %")
    if reasoning["consistency"] is not None:
        typer.echo(f"language     {100 * reasoning['consistency']:.1f} %")
    typer.echo(f"tokens       {reasoning['tokens']:.1f}, words of reflection {reasoning['reflections']:.2f}")
    if found.get("mtp_acceptance") is not None:
        typer.echo(f"drafts       {100 * found['mtp_acceptance']:.1f} % accepted")
    if "max_violation" in found:
        typer.echo(f"experts      busiest {100 * found['max_violation']:.0f} % above its share")


@r1.command()
def collect(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder of the results; the rows are in data.jsonl.", show_default=False)],
    task: Annotated[str, typer.Option(help="A source of problems: chains, gym, jsonl, dataset.")] = "chains",
    option: Annotated[list[str] | None, typer.Option(help="Of the source; repeatable.")] = None,
    template: Annotated[str, typer.Option(help="Form that the checkpoint was trained in.")] = "r1-marks",
    target: Annotated[str, typer.Option(help="Form of the rows.")] = "r1-marks",
    problems: Annotated[int, typer.Option(min=1, help="Problems of the training split.")] = 1000,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 4,
    keep: Annotated[int, typer.Option(min=1, help="Rows of each, at most.")] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a sample.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of problems and samples.")] = 0,
) -> None:
    """Sample a checkpoint and keep the right and readable responses as training data."""
    from ..r1.pipeline import run_single

    fields = {
        "kind": "collect", "start_from": str(checkpoint), "task": {"name": task, **_options(option)},
        "template": template, "target": target, "decontaminate": 0,
        "collect": {"problems": problems, "samples": samples, "keep": keep, "max_new_tokens": max_new_tokens,
                    "temperature": temperature},
    }  # fmt: skip
    folder = run_single("collect", fields, out, seed)
    typer.echo(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rows"])


@r1.command()
def plan(recipe: RecipeName, changes: Changes = None, as_json: Json = False) -> None:
    """Memory and device hours of each stage, from the recipe's fields and the sizes in its pipeline.yaml."""
    from dataclasses import asdict

    from ..r1.pipeline import load_recipe
    from ..r1.planning import plan_recipe

    loaded = load_recipe(recipe, changes or ())
    if not loaded.plan:
        raise ValueError(f"expected a recipe with a plan in its pipeline.yaml, got {loaded.name!r} without one")
    plans = plan_recipe(loaded.stages, loaded.plan)
    if as_json:
        print_json([{**asdict(one), "hours": one.hours} for one in plans])
        return
    devices = loaded.plan.get("devices", 1)
    typer.echo(f"{loaded.name} on {devices} x {loaded.plan.get('device', 'H800')}")
    for one in plans:
        typer.echo(
            f"{one.stage:<14}{one.kind:<11}{one.tokens / 1e9:>9.2f} G tokens{one.hours:>12,.0f} device hours"
            f" ({one.sampling_hours:,.0f} sampling){one.memory / 1e9:>9.1f} GB a device"
        )
    typer.echo(f"{'all':<25}{sum(one.hours for one in plans):>30,.0f} device hours")


@r1.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Results of a run.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe that gives title and order.", show_default="order of the run")
    ] = None,
) -> None:
    """Write REPORT.md anew from the results in a folder."""
    from ..r1.pipeline import load_recipe, write_report

    typer.echo(write_report(folder, None if recipe is None else load_recipe(recipe)))


@r1.command()
def chat(
    checkpoint: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a response.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the best tokens that sum to this.")] = 0.95,
    mtp_depth: Annotated[int, typer.Option(min=0, help="Draft so many tokens a step.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Device = "cpu",
) -> None:
    """Talk to a checkpoint, line by line: thoughts are shown dimmed, and are forgotten in the next turn."""
    import sys

    reasoner = _reasoner(checkpoint, max_new_tokens, temperature, top_p, mtp_depth, device)
    messages: list[dict[str, str]] = []

    def emit(kind: str, text: str) -> None:
        typer.secho(text, nl=False, dim=kind == "reasoning_content")

    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        reply = reasoner.respond(messages, emit, seed=seed)
        typer.echo("" if reply.finish_reason == "stop" else " ...")
        messages.append({"role": "assistant", "content": reply.content})


@r1.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Of the model, as clients ask for it.")] = "deepseek-reasoner",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a response.")] = 512,
    mtp_depth: Annotated[int, typer.Option(min=0, help="Draft so many tokens a step.")] = 0,
    device: Device = "cpu",
) -> None:
    """Serve a checkpoint to clients of OpenAI's protocol, with reasoning_content apart, streamed or not."""
    from ..r1.serving import make_server

    reasoner = _reasoner(checkpoint, max_new_tokens, 0.6, 0.95, mtp_depth, device)
    server = make_server(reasoner, host, port, name)
    typer.echo(f"http://{server.server_address[0]!s}:{server.server_address[1]}/v1 serves {name}; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def _reasoner(
    checkpoint: Path, max_new_tokens: int, temperature: float, top_p: float, mtp_depth: int, device: str
) -> Any:
    from ..r1.serving import Reasoner
    from ..r1.stages import Policy
    from ..r1.stages.training import bars

    with bars(False):
        policy = Policy.load(checkpoint, device=device)
    return Reasoner(policy, max_new_tokens, temperature, top_p, mtp_depth)


def _options(pairs: list[str] | None) -> dict[str, Any]:
    from ..r1.pipeline.recipe import parse_value

    out = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"expected name=value, got {pair!r}", param_hint="--option")
        out[name] = parse_value(value)
    return out
