"""The `deepseek-arch` command.

Exit codes: 0 done, 1 what was asked cannot be done (one message on stderr, no traceback), 2 wrong usage. Imports are
inside the commands, so that help and `plan` need not wait for PyTorch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import tables
from .checkpoint_commands import convert, inspect, slice_
from .generation_commands import generate, probe
from .options import Json, print_json
from .reasoning import r1

__all__ = ["app", "main"]

app = typer.Typer(
    name="deepseek-arch",
    help="DeepSeek-family models: plan them, inspect and slice their checkpoints, generate with them, train R1.",
    epilog="Set DEEPSEEK_ARCH_TRACEBACK=1 to see where an error came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        from .. import __version__

        typer.echo(f"deepseek-arch {__version__}")
        raise typer.Exit


def _complete_preset(start: str) -> list[str]:
    """Returns the presets whose names begin with `start`, for the shell."""
    from ..config.presets import presets as names

    return [name for name in names() if name.startswith(start)]


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A preset name (`deepseek-arch presets` lists them), a config.json, or a checkpoint folder.",
            show_default=False,
            autocompletion=_complete_preset,
        ),
    ],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are cached at a time.")] = 1,
    memory: Annotated[
        list[float] | None,
        typer.Option(help="Memory of a device in GB (10^9 bytes); repeatable.", show_default="24, 40, 80, 141"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Plan training and serving on so many devices.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="With --gpus: h800, h100, h200, h20, a100, b200, gb200.")] = "h800",
    layout: Annotated[
        str | None,
        typer.Option(
            help="With --gpus: sizes of pp, dp_replicate, dp_shard, cp, tp, ep, etp, as pp=16,ep=64.",
            show_default="the fastest",
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="With --gpus: the best ten layouts; --layout fixes some axes.")
    ] = False,
    step_batch: Annotated[int, typer.Option(min=1, help="With --gpus: sequences of a training step.")] = 15360,
    micro_batch: Annotated[int, typer.Option(min=1, help="With --gpus: sequences that run at a time.")] = 1,
    schedule: Annotated[
        Literal["1f1b", "interleaved", "zero_bubble", "zbv", "dualpipe", "dualpipev"] | None,
        typer.Option(help="With --gpus: order of the pipeline.", show_default="the fastest"),
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(
            min=1, max=3, help="With --gpus: share optimizer states, gradients, weights.", show_default="the fastest"
        ),
    ] = None,
    recompute: Annotated[
        Literal["none", "selective", "full"] | None,
        typer.Option(help="With --gpus: activations computed again.", show_default="the fastest"),
    ] = None,
    precision: Annotated[
        Literal["fp8", "bf16"] | None,
        typer.Option(help="With --gpus: of products and served weights.", show_default="fp8 if published so"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, cache and weight memory of a model, from its config alone.

    With --gpus: memory, traffic and time of a training step and of serving on many devices.
    """
    from ..config.deepseek_config import DeepseekConfig
    from .memory_plan import DEVICE_GIGABYTES, plan_memory

    config = DeepseekConfig.from_pretrained(model)
    if gpus is not None:
        from .device_plan import PlanRequest, plan_devices, print_device_plans

        request = PlanRequest(
            gpus, device, layout, search, context, batch, step_batch, micro_batch, schedule, zero, recompute, precision
        )
        plans = plan_devices(config, request)
        if as_json:
            print_json({"model": model, **plans.to_dict()})
        else:
            print_device_plans(model, plans)
        return
    if layout is not None or search:
        raise typer.BadParameter("expected --gpus with --layout and --search", param_hint="--gpus")
    made = plan_memory(config, context, batch, memory or DEVICE_GIGABYTES)
    if as_json:
        print_json({"model": model, **made.to_dict()})
    else:
        tables.print_plan(model, made)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the configs that are known by name: the published ones, and two small ones to start with."""
    from ..config.deepseek_config import DeepseekConfig
    from ..config.presets import presets as names

    configs = {name: DeepseekConfig.from_pretrained(name) for name in names()}
    if as_json:
        print_json(list(configs))
    else:
        tables.print_presets(configs)


@app.command()
def place(
    loads: Annotated[
        Path, typer.Argument(help="JSON that LoadReport.save or LoadHistory.save wrote.", show_default=False)
    ],
    devices: Annotated[int, typer.Option(min=1, help="Devices to place experts on.", show_default=False)],
    redundant: Annotated[int, typer.Option(min=0, help="Copies of busy experts beyond one of each.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, each of which keeps its consecutive experts.")] = 1,
    last: Annotated[
        int | None, typer.Option(min=1, help="Average over so many last steps of a history.", show_default="all")
    ] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Router to plan for; repeatable.", show_default="all")] = None,
    as_json: Json = False,
) -> None:
    """Place experts, and copies of the busiest, by recorded loads; print the imbalance before and after."""
    from .placement import placements, print_placements, to_json

    plans = placements(loads, devices, redundant, nodes, last, layer or ())
    if as_json:
        print_json(to_json(plans))
    else:
        print_placements(plans)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, and which implementation each operator will use here and why."""
    from .doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        tables.print_doctor(facts)


@app.command()
def build_kernels(
    into_package: Annotated[
        bool, typer.Option("--into-package", help="Into the package's own folder, for a wheel, not the cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile the C++ operators for this CPU, which then run by default; takes up to a minute, once.

    They are kept in DEEPSEEK_KERNELS_CACHE, by default ~/.cache/deepseek_kernels, for this PyTorch and compiler.
    """
    from deepseek_kernels.common import cpu

    try:
        library = cpu.build_library(into_package)
    except cpu.BuildError as error:
        raise ValueError(f"expected a C++ compiler that builds the operators for this CPU: {error}") from error
    if as_json:
        print_json({"library": str(library)})
    else:
        typer.echo(f"Built: {library}")


app.command()(inspect)
app.command(name="slice")(slice_)
app.command()(convert)
app.command()(generate)
app.command(name="probe-mtp")(probe)
app.add_typer(r1, name="r1")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; always ends in SystemExit."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            app(args=None if args is None else list(args), prog_name="deepseek-arch")
    except (ValueError, OSError, ImportError, MemoryError, ArithmeticError, RuntimeError) as error:
        # What a user passed, a file system, a missing optional package: all of these say what was expected. PyTorch
        # raises RuntimeError where a device is absent or out of memory, with pages of details behind the first line.
        if os.environ.get("DEEPSEEK_ARCH_TRACEBACK"):
            raise
        text = str(error) if isinstance(error, (ValueError, OSError)) else str(error).partition("\n")[0]
        # Names in a file may hold what no terminal can show.
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        typer.echo(f"error: {text or type(error).__name__}", err=True)
        raise SystemExit(1) from None
