"""The commands of `python -m benchmarks`.

A command is a module with a dataclass `Settings`, whose fields are its options (see `core.options`), and a function
`main(settings)` that returns the exit status. The module is imported only when its command runs, so that `kernels` and
`gpu` need nothing but torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from ..core.options import parse_settings, parser_of

__all__ = ["COMMANDS", "Command", "main", "run"]


@dataclass(frozen=True)
class Command:
    """One command: its name, the module of `benchmarks` that implements it, and a line for the list of commands."""

    name: str
    module: str
    about: str

    @property
    def prog(self) -> str:
        return f"python -m benchmarks {self.name}"

    def load(self) -> ModuleType:
        return importlib.import_module(f"benchmarks.{self.module}")

    def options(self) -> set[str]:
        """Returns the names of the options, with their dashes."""
        parser = parser_of(self.prog, self.load().Settings, "")
        return {name for action in parser._actions for name in action.option_strings}


COMMANDS = {
    command.name: command
    for command in (
        Command("kernels", "operators.run", "Operators against torch's built-ins, at the shapes of published models."),
        Command("gpu", "gpu.run", "Every GPU check and benchmark, within ten minutes."),
        Command("model", "models.whole_model", "The whole model against transformers' on the same weights."),
        Command("gguf", "models.gguf_file", "Writes a GGUF file of the same weights, for `model --llama-bench`."),
        Command("fp8-weights", "models.fp8_weights", "FP8 weights under high-precision activations, against a cast."),
        Command(
            "sparse", "models.sparse_attention", "Sparse attention against dense and transformers', at V3.2's widths."
        ),
        Command("overhead", "models.overhead", "Calls, files and time of a decode step, where operators are small."),
        Command("parallel", "layouts.run", "Layouts over several devices, checked and timed; started by torchrun."),
        Command("rollouts", "models.rollouts", "Sampling of a trained policy: this engine and transformers'."),
        Command("convert", "models.convert", "Conversion of checkpoints against copying them."),
        Command("fp8-training", "training.fp8_training", "Training in FP8 against training in BF16."),
        Command("train-mini", "training.mini_measurements", "A small model trained from nothing, and measured."),
        Command("r1-table", "training.r1_tables", "Tables of the R1 recipe's results, printed or put into a document."),
        Command("compare", "cli.compare_reports", "Compares two reports; exits with 1 if a row regressed or is gone."),
        Command("plot", "cli.plot_report", "Draws a report of `kernels`: roofline, bandwidth and sweeps."),
        Command("table", "cli.table_of_report", "Prints a report as a Markdown table, or puts it into a document."),
    )
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit status.

    Raises:
        ValueError: an unknown command, or settings that mean nothing.
        SystemExit: arguments that argparse refuses, after a message; `--help`.
    """
    if name not in COMMANDS:
        raise ValueError(f"expected a command among {', '.join(COMMANDS)}, got {name!r}")
    command = COMMANDS[name]
    module = command.load()
    return module.main(parse_settings(command.prog, module.Settings, module.__doc__, arguments))


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; an error that the user can correct is one line, without a traceback."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    try:
        return run(arguments[0], arguments[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("benchmarks", "deepseek_")):
            raise
        print(f"error: `{arguments[0]}` needs the package {error.name}, which is not installed", file=sys.stderr)
    return 2


def overview() -> str:
    """Returns the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:{width}}  {command.about}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: python -m benchmarks COMMAND [options]",
            "",
            "Measures deepseek-arch. Run from the repository root, on a machine that does nothing else.",
            "",
            *lines,
            "",
            "python -m benchmarks COMMAND --help shows the options of a command.",
        ]
    )
