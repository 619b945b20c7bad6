"""A command for a benchmark with a `Settings` dataclass and `run(settings, ...)`: each field is an option.

`run` may also take `on_row`, called with each row as it comes, and `parts`, which becomes `--only`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..core.report import Report, Row
from ..core.tables import show

__all__ = ["main", "parser_of"]

RESULTS = Path("benchmarks") / "results"


def parser_of(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Options named after the fields of `module.Settings`, with their defaults."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=f"{module.__doc__}\n{module.Settings.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = dataclasses.fields(module.Settings)
    for field in fields:
        option, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(option, type=_reader(default), default=default, help=f"[{_text(default)}]")
    if "threads" not in {field.name for field in fields}:
        parser.add_argument("--threads", type=int, default=2, help="[2]")
    if "parts" in inspect.signature(module.run).parameters:
        parts = ",".join(module.PARTS)
        parser.add_argument("--only", type=_reader(module.PARTS), default=module.PARTS, help=f"parts [{parts}]")
    parser.add_argument("--out", type=Path, help=f"report file (default: in {RESULTS.as_posix()})")
    return parser


def _reader(default: Any, separators: str = ",x") -> Callable[[str], Any]:
    """From an option's text to a value of the default's type: tuples have commas, those in tuples an x between items.

    Where the default is None, the text itself.
    """
    if isinstance(default, tuple):
        item = _reader(default[0] if default else None, separators[1:])
        return lambda text: tuple(item(part) for part in text.split(separators[0]))
    return str if default is None else type(default)


def _text(value: Any, separators: str = ",x") -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return separators[0].join(_text(item, separators[1:]) for item in value)
    return str(value).replace("%", "%%")


def main(name: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Measures, shows and saves."""
    values = vars(parser_of(name, module).parse_args(arguments))
    path = values.pop("out") or RESULTS / f"{name}.json"
    known = {field.name for field in dataclasses.fields(module.Settings)}
    more: dict[str, Any] = {"parts": values.pop("only")} if "only" in values else {}
    if "on_row" in inspect.signature(module.run).parameters:
        more["on_row"] = _progress
    if "threads" not in known:
        torch.set_num_threads(values.pop("threads"))
    report: Report = module.run(module.Settings(**values), **more)
    show(report)
    report.save(path)
    print(f"saved {path}")
    return 0


def _progress(row: Row) -> None:
    medians = ", ".join(f"{who} {samples.median:.4g}" for who, samples in row.results.items())
    print(f"{row.name} ({row.unit}): {medians}", file=sys.stderr)
