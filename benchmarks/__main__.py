"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

__all__ = ["main"]

# Commands that read their own arguments, so that they run where torch is installed and typer is not: name, module,
# what it does.
_OWN = (
    ("kernels", "operators.run", "Operators against torch's built-ins, at the shapes of published models."),
    ("gpu", "gpu.run", "Every GPU check and benchmark, within ten minutes."),
)
# Modules with a `Settings` dataclass, whose fields become options, and `run`.
_WITH_SETTINGS = (
    ("fp8-weights", "models.fp8_weights", "FP8 weights under high-precision activations, against torch's own cast."),
    ("fp8-training", "training.fp8_training", "Training in FP8 against training in BF16."),
    ("convert", "models.convert", "Conversion of checkpoints against copying them."),
    ("overhead", "models.overhead", "Calls, files and time of a decode step, where operators are small."),
    ("train-mini", "training.mini", "A small model trained from nothing."),
)


def _commands() -> dict[str, tuple[str, Callable[[Sequence[str]], int]]]:
    """What each command does, and a function from its arguments to the exit status."""
    found = {name: (about, _own(module)) for name, module, about in _OWN}
    there = [one for one in _WITH_SETTINGS if find_spec(f"benchmarks.{one[1]}")]
    return found | {name: (about, _with_settings(name, module)) for name, module, about in there}


def _own(module: str) -> Callable[[Sequence[str]], int]:
    return lambda arguments: importlib.import_module(f"benchmarks.{module}").main(arguments)


def _with_settings(name: str, module: str) -> Callable[[Sequence[str]], int]:
    def run(arguments: Sequence[str]) -> int:
        from .cli.settings_command import main as run_with_settings

        return run_with_settings(name, importlib.import_module(f"benchmarks.{module}"), arguments)

    return run


def main() -> None:
    """Runs the command line; what a user can mend is one line, without a traceback."""
    commands = _commands()
    try:
        if find_spec("typer") is None:
            if len(sys.argv) < 2 or sys.argv[1] not in commands:
                raise ValueError(f"expected one of {', '.join(commands)}; the other commands need typer")
            raise SystemExit(commands[sys.argv[1]][1](sys.argv[2:]))
        from .cli.commands import app, include

        for name, (about, command) in commands.items():
            include(name, about, command)
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
