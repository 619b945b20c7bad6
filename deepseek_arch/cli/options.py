"""Options that several commands share, and their output as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = ["Checkpoint", "DType", "Device", "Json", "parse_numbers", "print_json"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[
    Path, typer.Argument(help="Folder with config.json and safetensors in the published layout.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
DType = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Of the weights that are not FP8, and the activations.", show_default="config's"),
]


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def parse_numbers(text: str, option: str, ranges: bool = False) -> Iterable[int]:
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
