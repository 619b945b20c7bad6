"""The README: its Python blocks run, its commands and files exist, its tables are those of the committed reports."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```$", TEXT + MEASUREMENTS, re.DOTALL | re.MULTILINE)
MOST_LINES = 12
TITLES = ["quick start", "train", "checkpoints", "fp8", "experts", "sparse", "operators", "cpu", "transformers", "plan"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder in which the blocks run, with the checkpoint that the second one writes: each also runs alone."""
    import deepseek_arch as da
    from deepseek_arch.checkpoint.synthetic import write_checkpoint

    path = tmp_path_factory.mktemp("readme")
    write_checkpoint(path / "checkpoint", da.DeepseekConfig.from_pretrained("tiny"), "fp8", shards=4)
    return path


def test_there_is_one_block_for_each_job():
    assert len(BLOCKS) == len(TITLES)


@pytest.mark.parametrize("block", BLOCKS, ids=TITLES)
def test_python_blocks_are_short_and_run(block, folder, monkeypatch):
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES
    for package in ("transformers", "peft", "accelerate"):
        if package in block or "Trainer" in block:
            pytest.importorskip(package)
    monkeypatch.chdir(folder)
    if "deepseek_arch.hf" not in block:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        return
    import deepseek_arch.hf as dhf

    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        dhf.unregister()


def test_the_fine_tuned_checkpoint_of_the_second_block_loads(folder, monkeypatch):
    import deepseek_arch as da

    monkeypatch.chdir(folder)
    exec(compile(BLOCKS[TITLES.index("checkpoints")], "README.md", "exec"), {"__name__": "readme"})
    checkpoint = da.inspect_checkpoint(folder / "fine-tuned")
    assert checkpoint.ok
    assert len(checkpoint.shards) > 1


def test_shell_blocks_name_commands_that_exist():
    from typer.main import get_command

    from benchmarks.cli.commands import COMMANDS
    from benchmarks.core.options import parser_of
    from deepseek_arch.cli import app as command_line

    def options_of(command) -> set[str]:
        if command in COMMANDS.values():
            return command.options()
        return {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {"deepseek-arch": get_command(command_line).commands, "python -m benchmarks": COMMANDS}
    seen = set()
    for line in "".join(SHELL).splitlines():
        text = line.partition(" #")[0].strip()
        if text.startswith(("pip install ", "hf download ")):
            continue
        if text.startswith("make "):
            assert re.search(rf"^{text.split()[1]}:", makefile, re.MULTILINE), text
            continue
        if text.startswith("torchrun "):
            module, *arguments = shlex.split(text.partition(" -m ")[2])
            if module == "benchmarks":
                module = f"benchmarks.{COMMANDS[arguments.pop(0)].module}"
            parser_of(module, importlib.import_module(module).Settings, "").parse_args(arguments)
            continue
        start = next(start for start in known if text.startswith(start + " "))
        name, *rest = text.removeprefix(start).split()
        options = options_of(known[start][name])
        assert {word for word in rest if word.startswith("--")} <= options, text
        seen.add((start, name))
    assert {name for start, name in seen if start == "deepseek-arch"} == set(known["deepseek-arch"])


def test_the_map_of_the_package_names_every_folder_in_the_order_of_imports():
    from test_imports import ORDER

    text = (ROOT / "deepseek_arch" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE) == ORDER
    assert {path.parent.name for path in (ROOT / "deepseek_arch").glob("*/__init__.py")} == set(ORDER)


def test_tables_are_those_of_the_committed_reports():
    pytest.importorskip("transformers")
    from benchmarks.cli.table_of_report import refresh_document
    from benchmarks.core.report import Report

    paths = re.findall(r"^<!-- begin (\S+) -->$", MEASUREMENTS, re.MULTILINE)
    assert paths
    for path in paths:
        new = refresh_document(MEASUREMENTS, path, Report.load(ROOT / path))
        assert new == MEASUREMENTS, f"run: python -m benchmarks table {path} --into benchmarks/README.md"


def test_tables_of_the_r1_recipe_are_those_of_its_committed_results():
    from benchmarks.training.r1_tables import FOLDER, claims_table, load_results, refresh, stage_table

    box, seeds, students = load_results(FOLDER)
    for text, name, table in (
        (TEXT, "r1 stages", stage_table(box)),
        (MEASUREMENTS, "r1 claims", claims_table(box, seeds, students)),
    ):
        assert refresh(text, {name: table}) == text, (
            "run: python -m benchmarks r1-table --into README.md, and the other"
        )


def test_links_lead_somewhere():
    """Every relative link of every document of the repository."""
    for document in ROOT.glob("**/*.md"):
        if ".venv" in document.parts:
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"
