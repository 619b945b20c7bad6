"""The `deepseek-arch` command.

Exit codes: 0 done, 1 what was asked cannot be done (one message on stderr, no traceback), 2 wrong usage. Imports are
inside the commands, so that help and `plan` need not wait for PyTorch.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import tables

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["app", "main"]

app = typer.Typer(
    name="deepseek-arch",
    help="DeepSeek-family models: plan them, inspect and slice their checkpoints, generate with them.",
    epilog="Set DEEPSEEK_ARCH_TRACEBACK=1 to see where an error came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MOST_TOKENS = 10_000_000  # of a reply; the context of a model is shorter

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    Path, typer.Argument(help="Folder with config.json and safetensors in the published layout.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
DType = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Of the weights that are not FP8, and the activations.", show_default="config's"),
]


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
            _print_json({"model": model, **plans.to_dict()})
        else:
            print_device_plans(model, plans)
        return
    if layout is not None or search:
        raise typer.BadParameter("expected --gpus with --layout and --search", param_hint="--gpus")
    made = plan_memory(config, context, batch, memory or DEVICE_GIGABYTES)
    if as_json:
        _print_json({"model": model, **made.to_dict()})
    else:
        tables.print_plan(model, made)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the configs that are known by name: the published ones, and two small ones to start with."""
    from ..config.deepseek_config import DeepseekConfig
    from ..config.presets import presets as names

    configs = {name: DeepseekConfig.from_pretrained(name) for name in names()}
    if as_json:
        _print_json(list(configs))
    else:
        tables.print_presets(configs)


@app.command()
def inspect(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """List a checkpoint's tensors, those that would be loaded, and everything that is wrong with it.

    Reads the config and the headers of the shards only. Exits with 1 if the checkpoint would not load.
    """
    from ..checkpoint import inspect_checkpoint

    report = inspect_checkpoint(checkpoint)
    if as_json:
        _print_json(report.to_dict())
    else:
        tables.print_inspection(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command(name="slice")
def slice_(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers to keep: 0,3,60 or 0-3 or both.", show_default="all")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Keep the first so many routed experts.", show_default="all")
    ] = None,
    mtp: Annotated[bool, typer.Option(help="Keep the MTP modules.")] = True,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 500MB or 5GB.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Write part of a checkpoint as a smaller checkpoint, FP8 codes and scales copied as they are."""
    from ..checkpoint import slice_checkpoint

    chosen = None if layers is None else _parse_numbers(layers, "--layers", ranges=True)
    saved = slice_checkpoint(checkpoint, out, chosen, experts, mtp, max_shard_size)
    if as_json:
        _print_json({"path": str(saved.path), "tensors": saved.tensors, "bytes": saved.nbytes})
    else:
        typer.echo(saved)


@app.command()
def convert(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    to: Annotated[Literal["fp8", "bf16"], typer.Option(help="FP8 with block scales, or none.", show_default=False)],
    stacked: Annotated[
        bool | None,
        typer.Option(
            "--stacked/--per-expert",
            help="A layer's experts in one tensor, or one each as published.",
            show_default="as they are",
        ),
    ] = None,
    ue8m0: Annotated[bool, typer.Option("--ue8m0", help="Powers of two as new FP8 scales.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and needed; write nothing.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and compare it, bit for bit.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from where an interrupted conversion stopped.")
    ] = True,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 500MB or 5GB.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Write a checkpoint in FP8 or BF16, its experts stacked or single; bytes that need not change do not."""
    from ..checkpoint import convert as convert_checkpoint
    from ..checkpoint import plan_conversion

    arguments = (checkpoint, out, to, stacked, max_shard_size, "ue8m0" if ue8m0 else None)
    if dry_run:
        from .convert_output import print_conversion

        planned = plan_conversion(*arguments)
        if as_json:
            _print_json(planned.to_dict())
        else:
            print_conversion(planned)
        return
    done = convert_checkpoint(*arguments, resume=resume, verify=verify)
    if as_json:
        _print_json(done.to_dict())
    else:
        typer.echo(done)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text; needs a tokenizer in the folder.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of text: 0,17,4.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, max=_MOST_TOKENS, help="Most tokens to add.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the so many best tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the best tokens that sum to this.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")] = None,
    mtp_depth: Annotated[int, typer.Option(min=0, help="Draft up to so many tokens a step with the MTP modules.")] = 0,
    fp8: Annotated[Literal["keep", "dequantize"], typer.Option(help="What to do with FP8 weights.")] = "keep",
    device: Device = "cpu",
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, given as text or as token ids; new tokens are printed as they come."""
    from .tokenizer import Tokenizer, TokenPrinter

    if (prompt is None) == (ids is None):
        raise typer.BadParameter("expected either --prompt or --ids", param_hint="--prompt / --ids")
    tokenizer = Tokenizer.of(checkpoint)
    tokens = list(_parse_numbers(ids, "--ids")) if ids is not None else _encode(tokenizer, prompt or "", checkpoint)

    import torch

    from ..checkpoint import load
    from ..generation.entry import generate as continue_prompt

    model = load(checkpoint, device=device, dtype=dtype, fp8=fp8, mtp=mtp_depth > 0)
    printer = TokenPrinter(tokenizer, None if as_json else partial(typer.echo, nl=False))
    started = time.perf_counter()
    out, report = continue_prompt(
        model,
        torch.tensor([tokens], device=device),
        max_new_tokens=max_new_tokens,
        mtp_depth=mtp_depth,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        callback=printer,
        return_report=True,
    )
    seconds = time.perf_counter() - started
    new = out[0, len(tokens) :].tolist()
    if as_json:
        text = None if tokenizer is None else tokenizer.decode(new)
        drafts = {"acceptance": report.acceptance} if mtp_depth else {}
        _print_json({"prompt_ids": tokens, "new_ids": new, "text": text, "seconds": seconds, **drafts})
    else:
        printer.end()
        drafted = f"; {report}" if mtp_depth else ""
        typer.echo(f"{len(new)} tokens in {seconds:.2f} s{drafted}", err=True)


@app.command(name="probe-mtp")
def probe(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text; needs a tokenizer in the folder.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids instead of text: 0,17,4.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=2, max=_MOST_TOKENS, help="Tokens to add.")
    ] = 64,
    mtp_depth: Annotated[int, typer.Option(min=1, help="Tokens to draft a step.")] = 2,
    device: Device = "cpu",
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Measure which inputs the MTP modules were trained with, by how many of their drafts are accepted."""
    from .tokenizer import Tokenizer

    if (prompt is None) == (ids is None):
        raise typer.BadParameter("expected either --prompt or --ids", param_hint="--prompt / --ids")
    tokens = (
        list(_parse_numbers(ids, "--ids"))
        if ids is not None
        else _encode(Tokenizer.of(checkpoint), prompt or "", checkpoint)
    )
    import torch

    from ..checkpoint import load
    from ..generation.mtp_probe import probe_mtp

    model = load(checkpoint, device=device, dtype=dtype)
    probes = probe_mtp(model, torch.tensor([tokens], device=device), None, max_new_tokens, mtp_depth)
    if as_json:
        _print_json([asdict(probe) for probe in probes])
    else:
        for probe in probes:
            typer.echo(probe)


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
        _print_json(to_json(plans))
    else:
        print_placements(plans)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, and which implementation each operator will use here and why."""
    from .doctor import examine

    facts = examine()
    if as_json:
        _print_json(facts)
    else:
        tables.print_doctor(facts)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _parse_numbers(text: str, option: str, ranges: bool = False) -> Iterable[int]:
    """Returns the numbers in `0,3,60` or `0 3 60`, with `ranges` also in `0-3`; a range is not listed, however long."""
    numbers: list[range] = []
    for part in re.split(r"[,\s]+", text.strip(", \t\n")):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?" if ranges else r"(\d{1,18})", part, re.ASCII)
        if match is None:
            forms = "0,3,60 or 0-3" if ranges else "0,17,4"
            raise typer.BadParameter(f"expected numbers such as {forms}, got {text[:200]!r}", param_hint=option)
        first = int(match[1])
        last = int(match[2]) if ranges and match[2] else first
        if last < first:
            raise typer.BadParameter(f"expected a range that ascends, got {part!r}", param_hint=option)
        numbers.append(range(first, last + 1))
    return chain.from_iterable(numbers)


def _encode(tokenizer: Tokenizer | None, prompt: str, checkpoint: Path) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"expected a tokenizer in {str(checkpoint)!r} for --prompt, found no tokenizer.json or "
            "tokenizer_config.json; give token ids with --ids"
        )
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("expected a prompt of at least one token, got an empty one")
    return tokens


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
