"""Command-line options from a dataclass: each field is an option of its name, type and default.

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        report: Annotated[Path, "a report"]                                                         REPORT
        rounds: Annotated[int, "runs of each contestant"] = 3                                       --rounds 3
        sizes: Annotated[tuple[int, ...], "sizes to measure"] = (1, 2)                              --sizes 1,2
        budget_s: Annotated[float, "seconds after which a contestant is not run again"] = 20.0      --budget 20

A field without a default is an argument given by its place. Tuples take items separated by commas or as several words;
within the items of a tuple of tuples, an x stands between numbers. argparse, so that a command runs where nothing but
torch is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["parse_settings", "parser_of"]

Settings = TypeVar("Settings")
_SECONDS = "_s"  # ends the names of fields, but not of options


def parser_of(command: str, settings: type, description: str) -> argparse.ArgumentParser:
    """Returns the parser of a command whose options are the fields of the dataclass `settings`."""
    parser = argparse.ArgumentParser(
        prog=command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        kind, text = _split(hints[field.name])
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, type=_reader(kind), help=text)
        else:
            _add_option(parser, field.name, kind, field.default, text)
    return parser


def _split(hint: Any) -> tuple[Any, str]:
    """The type and the help of a field."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, ""
    kind, text = typing.get_args(hint)
    return kind, text.replace("%", "%%")


def _add_option(parser: argparse.ArgumentParser, field: str, kind: Any, default: Any, text: str) -> None:
    name = field.removesuffix(_SECONDS).replace("_", "-")
    if default not in (None, "", (), False):
        text = f"{text} [{_text(default)}]".lstrip()
    details: dict[str, Any] = {"dest": field, "default": default, "help": text}
    shown = name.upper()
    name = f"--{name}"
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction if default else "store_true", **details)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(name, type=_reader(kind), nargs="+", action=_Join, metavar=shown, **details)
    elif typing.get_origin(kind) is typing.Literal:
        parser.add_argument(name, choices=typing.get_args(kind), **details)
    else:
        parser.add_argument(name, type=_reader(kind), metavar=shown, **details)


class _Join(argparse.Action):
    """Joins the tuples of several words."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, sum(values, ()))


def _text(value: Any, separators: str = ",x") -> str:
    """A default as a user would type it."""
    if isinstance(value, tuple):
        return separators[0].join(_text(item, separators[1:]) for item in value)
    return str(value)


def _reader(kind: Any, separators: str = ",x") -> Callable[[str], Any]:
    """Returns the function from an option's text to a value of the type `kind`."""
    if typing.get_origin(kind) is tuple:
        item = _reader(typing.get_args(kind)[0], separators[1:])

        def read(text: str) -> tuple[Any, ...]:
            return tuple(item(part) for part in text.split(separators[0]) if part)

        read.__name__ = "list"  # argparse names it in its error message
        return read
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
    if kind not in (str, int, float, Path):
        raise TypeError(f"expected a field of str, int, float, bool, Path, a Literal or a tuple, got {kind}")
    return kind


def parse_settings(command: str, settings: type[Settings], description: str, arguments: Sequence[str]) -> Settings:
    """Reads the arguments of a command.

    Raises:
        ValueError: `settings` refuses a value.
        SystemExit: an unknown option, or text that is no such number (after a message); `--help`.
    """
    return settings(**vars(parser_of(command, settings, description).parse_args(arguments)))
