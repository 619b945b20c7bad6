"""Imports go one way only, and importing the package costs nothing that was not asked for."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "deepseek_arch"
KERNELS = ROOT / "kernels" / "deepseek_kernels"

# What is imported only after Triton has been chosen.
KERNEL_FILES = ("kernel.py", "backward.py", "tiles.py", "descriptors.py")

# What trains with transformers and TRL; the rest of `r1` needs neither.
TRAINERS = ("r1/trainer/", "r1/stages/")

# Rooms, in the order in which they may import each other: each only those before it.
ORDER = [
    "config",
    "layout",
    "planning",
    "layers",
    "moe",
    "quant",
    "cache",
    "attention",
    "models",
    "checkpoint",
    "generation",
    "hf",
    "r1",
    "cli",
]


def imported(path: Path) -> set[str]:
    """Dotted names of everything `path` imports anywhere, inside functions too; relative ones made absolute."""
    folder = path.parent.relative_to(ROOT if path.is_relative_to(PACKAGE) else KERNELS.parent)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(folder.parts[: len(folder.parts) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def layer(path: Path) -> str:
    """The entry of ORDER that `path` belongs to: its own name, or its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_layers_below_it(path):
    allowed = ORDER[: ORDER.index(layer(path))]
    for name in sorted(imported(path)):
        parts = name.split(".")
        if parts[0] == "deepseek_arch" and parts[1] != layer(path):
            assert parts[1] in (*allowed, "__version__"), f"{layer(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_hf_folder_and_trainers_import_transformers(path):
    if layer(path) == "hf" or path.relative_to(PACKAGE).as_posix().startswith(TRAINERS):
        return
    found = {name.split(".")[0] for name in imported(path)}
    # The command line reads a checkpoint's tokenizer, if there is one, with whatever is installed.
    allowed = {"transformers"} if path.name == "tokenizer.py" else set()
    assert not (found & {"transformers", "triton"}) - allowed


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_operators_depend_on_neither_the_architecture_nor_transformers(path):
    found = {name.split(".")[0] for name in imported(path)}
    assert not found & {"deepseek_arch", "transformers"}
    if path.name not in KERNEL_FILES:
        assert "triton" not in found


def test_dependencies_are_what_is_imported():
    """What the two packages import without asking is declared in pyproject.toml, and what is declared is imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    files = [
        path for path in MODULES if layer(path) not in ("hf", "r1") and path.name != "tokenizer.py"
    ]  # those need what they wrap
    files += [path for path in KERNELS.rglob("*.py") if path.name not in KERNEL_FILES]
    found = {name.split(".")[0] for path in files for name in imported(path)}
    found -= {*sys.stdlib_module_names, "deepseek_arch", "deepseek_kernels"}
    found -= {"matplotlib"}  # only to draw, and then it says which extra has it
    assert found == declared - {"numpy"}


def test_the_recipe_imports_what_its_extra_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["r1"]]
    declared = {re.match(r"[\w-]+", line)[0].replace("pyyaml", "yaml") for line in lines}
    found = {name.split(".")[0] for path in MODULES if layer(path) == "r1" for name in imported(path)}
    found -= {"matplotlib"}  # only to draw, and reports do without
    assert found - {*sys.stdlib_module_names, "deepseek_arch", "deepseek_kernels"} <= declared


def test_kernels_folder_is_not_a_package():
    """An __init__.py in either folder shadows the PyPI package `kernels`, and then transformers cannot be imported."""
    assert KERNELS.is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def fresh_process(code: str) -> list[str]:
    """The names of the modules loaded after running `code` in a new interpreter."""
    script = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n{code}\n"
    script += "import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_neither_transformers_nor_triton():
    names = "import deepseek_arch as da\nfor name in da.__all__: getattr(da, name)"
    loaded = fresh_process(names)
    assert "deepseek_arch.models.causal_lm" in loaded  # the names above were really resolved
    assert not {"transformers", "triton"} & set(loaded)


def test_the_command_line_starts_without_torch_and_transformers():
    loaded = fresh_process("import deepseek_arch.cli")
    assert "deepseek_arch.cli" in loaded
    assert not {"torch", "transformers", "triton"} & set(loaded)


def test_every_public_name_is_listed_once_and_resolves():
    import deepseek_arch

    names = re.findall(r"^from \S+ import (\w+)", (PACKAGE / "__init__.pyi").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) == len(set(names)) > 50
    assert set(deepseek_arch.__all__) == {*names, "__version__"}
    for name in names:
        assert getattr(deepseek_arch, name) is not None
        assert name in deepseek_arch.__doc__  # `help(deepseek_arch)` shows them by group
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = deepseek_arch.no_such_name
