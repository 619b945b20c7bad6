"""The command line of the benchmarks: commands, and options from dataclasses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from benchmarks.cli.commands import COMMANDS, main, run
from benchmarks.core.options import parse_settings, parser_of
from benchmarks.core.workers import environment

# ------------------------------------------------------------------ options


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    report: Annotated[Path, "a report"]
    rounds: Annotated[int, "at most 100% of it"] = 3
    budget_s: Annotated[float, "seconds"] = 2.0
    sizes: Annotated[tuple[int, ...], "sizes"] = (1, 2)
    shapes: Annotated[tuple[tuple[int, int], ...], "shapes"] = ((3, 4), (5, 6))
    names: tuple[str, ...] = ()
    folder: str | None = None
    device: Annotated[Literal["cpu", "cuda"], "device"] = "cpu"
    verbose: bool = False
    checked: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"expected rounds, got {self.rounds}")


def parsed(*arguments: str) -> Settings:
    return parse_settings("some", Settings, "Measures 100% of it.", arguments)


def test_every_field_is_an_option_of_its_type_and_default():
    assert parsed("a.json") == Settings(Path("a.json"))
    options = (
        "--rounds 5 --budget 7 --sizes 7,8 --shapes 1x2 --names a,b c --folder f --device cuda --verbose --no-checked"
    )
    assert parsed("a.json", *options.split()) == Settings(
        Path("a.json"), 5, 7.0, (7, 8), ((1, 2),), ("a", "b", "c"), "f", "cuda", True, False
    )


def test_help_shows_the_description_and_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "Measures 100% of it." in text
    assert "at most 100% of it [3]" in text
    assert "[3x4,5x6]" in text


@pytest.mark.parametrize(
    "wrong", [(), ("a", "b"), ("a", "--rounds", "x"), ("a", "--sizes", "1,x"), ("a", "--device", "tpu"), ("a", "--new")]
)
def test_text_that_is_no_such_value_is_a_usage_error(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*wrong)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_values_that_the_settings_refuse_are_value_errors():
    with pytest.raises(ValueError, match="expected rounds, got 0"):
        parsed("a.json", "--rounds", "0")


def test_a_field_of_another_type_is_refused():
    @dataclass
    class Wrong:
        value: complex = 0j

    Wrong.__annotations__["value"] = complex
    with pytest.raises(TypeError, match="expected a field of str, int, float"):
        parser_of("some", Wrong, "")


# ------------------------------------------------------------------ commands


@pytest.mark.parametrize("name", COMMANDS, ids="command {}".format)  # an id "gpu" alone would be taken for the mark
def test_every_command_has_settings_a_main_function_and_help(name, capsys):
    pytest.importorskip("transformers")
    module = COMMANDS[name].load()
    assert callable(module.main)
    with pytest.raises(SystemExit) as end:
        run(name, ["--help"])
    assert end.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 2


def test_an_unknown_command_is_one_line(capsys):
    assert main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: expected a command among kernels, gpu, model")


# A machine with torch and pytest only.
BARE = """
import sys
for name in ("typer", "rich", "transformers", "tqdm", "safetensors", "accelerate", "matplotlib", "hypothesis"):
    sys.modules[name] = None
from benchmarks.cli.commands import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BARE, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", [("kernels", "--list"), ("gpu", "--help")])
def test_operators_and_gpu_checks_need_nothing_but_torch(command):
    done = bare(*command)
    assert done.returncode == 0, done.stderr


def test_a_small_run_of_the_operators_needs_nothing_but_torch(tmp_path):
    options = ["--op", "moe_permute", "--shape", "tiny", "--rounds", "1", "--budget", "0", "--device", "cpu"]
    done = bare("kernels", *options, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "moe_permute.permute" in done.stdout
    assert (tmp_path / "out.json").exists()


def test_a_command_that_needs_a_missing_package_names_it():
    done = bare("model", "--preset", "tiny", "--layers", "2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: `model` needs the package transformers, which is not installed"


def test_the_gpu_command_imports_neither_typer_nor_rich_nor_transformers():
    code = (
        "import sys; from benchmarks.gpu import run, tasks; print({'typer', 'rich', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
