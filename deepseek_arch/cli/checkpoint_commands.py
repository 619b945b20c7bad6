"""Commands for checkpoint folders: inspect, slice, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import tables
from .options import Checkpoint, Json, parse_numbers, print_json

__all__ = ["convert", "inspect", "slice_"]


def inspect(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """List a checkpoint's tensors, those that would be loaded, and everything that is wrong with it.

    Reads the config and the headers of the shards only. Exits with 1 if the checkpoint would not load.
    """
    from ..checkpoint import inspect_checkpoint

    report = inspect_checkpoint(checkpoint)
    if as_json:
        print_json(report.to_dict())
    else:
        tables.print_inspection(report)
    if not report.ok:
        raise typer.Exit(1)


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

    chosen = None if layers is None else parse_numbers(layers, "--layers", ranges=True)
    saved = slice_checkpoint(checkpoint, out, chosen, experts, mtp, max_shard_size)
    if as_json:
        print_json({"path": str(saved.path), "tensors": saved.tensors, "bytes": saved.nbytes})
    else:
        typer.echo(saved)


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
            print_json(planned.to_dict())
        else:
            print_conversion(planned)
        return
    done = convert_checkpoint(*arguments, resume=resume, verify=verify)
    if as_json:
        print_json(done.to_dict())
    else:
        typer.echo(done)
