"""Imports go one way, and importing the package loads only what it needs."""

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

# Files that are imported only after Triton has been chosen.
KERNEL_FILES = ("kernel.py", "backward.py", "tiles.py", "descriptors.py")

# Folders that train with transformers and TRL; the rest of `r1` needs neither.
TRAINERS = ("r1/trainer/", "r1/stages/")

# Folders of deepseek_arch in the order of imports: each may import only those before it.
ORDER = [
    "config",
    "layout",
    "planning",
    "layers",
    "cache",
    "attention",
    "moe",
    "quant",
    "models",
    "parallel",
    "checkpoint",
    "generation",
    "hf",
    "r1",
    "cli",
]


# Folders of benchmarks, likewise; those of one line do not import each other.
BENCHMARKS = (("core",), ("operators", "models", "training", "layouts"), ("gpu",), ("cli",))


def imported(path: Path) -> set[str]:
    """Returns the dotted names of all imports of a file, also inside functions; relative ones made absolute."""
    folder = path.parent.relative_to(KERNELS.parent if path.is_relative_to(KERNELS) else ROOT)
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
    """Returns the folder of deepseek_arch that a file is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_folders_before_its_own(path):
    allowed = ORDER[: ORDER.index(layer(path))]
    for name in sorted(imported(path)):
        parts = name.split(".")
        if parts[0] == "deepseek_arch" and parts[1] != layer(path):
            assert parts[1] in (*allowed, "__version__"), f"{layer(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_hf_folder_and_trainers_import_transformers(path):
    if layer(path) == "hf" or path.relative_to(PACKAGE).as_posix().startswith(TRAINERS):
        return
    packages = {name.split(".")[0] for name in imported(path)}
    # The command line reads a checkpoint's tokenizer with any library that is installed.
    allowed = {"transformers"} if path.name == "tokenizer.py" else set()
    assert not (packages & {"transformers", "triton"}) - allowed


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_operators_depend_on_neither_the_architecture_nor_transformers(path):
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & {"deepseek_arch", "transformers"}
    if path.name not in KERNEL_FILES:
        assert "triton" not in packages


def test_dependencies_are_what_is_imported():
    """The unconditional imports of the two packages are the dependencies in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    # Those left out need optional packages.
    files = [path for path in MODULES if layer(path) not in ("hf", "r1") and path.name != "tokenizer.py"]
    files += [path for path in KERNELS.rglob("*.py") if path.name not in KERNEL_FILES]
    packages = {name.split(".")[0] for path in files for name in imported(path)}
    packages -= {*sys.stdlib_module_names, "deepseek_arch", "deepseek_kernels"}
    packages -= {"matplotlib"}  # only to draw; an error then names the extra
    assert packages == declared - {"numpy"}


def test_the_recipe_imports_what_its_extra_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["r1"]]
    declared = {re.match(r"[\w-]+", line)[0].replace("pyyaml", "yaml") for line in lines}
    packages = {name.split(".")[0] for path in MODULES if layer(path) == "r1" for name in imported(path)}
    packages -= {"matplotlib"}  # only to draw, and reports do without
    assert packages - {*sys.stdlib_module_names, "deepseek_arch", "deepseek_kernels"} <= declared


@pytest.mark.parametrize("folder", [folder for line in BENCHMARKS for folder in line], ids="benchmarks/{}".format)
def test_benchmarks_import_only_the_folders_before_their_own(folder):
    place = next(i for i, line in enumerate(BENCHMARKS) if folder in line)
    before = [name for line in BENCHMARKS[:place] for name in line]
    for path in (ROOT / "benchmarks" / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "benchmarks":
                assert parts[1] in (*before, folder), f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_folder_is_not_a_package():
    """An __init__.py in either folder shadows the PyPI package `kernels`, and then transformers cannot be imported."""
    assert KERNELS.is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def fresh_process(code: str) -> list[str]:
    """Runs `code` in a new interpreter and returns the names of the loaded modules."""
    script = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n{code}\n"
    script += "import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_neither_transformers_nor_triton():
    names = "import deepseek_arch as da\nfor name in da.__all__: getattr(da, name)"
    loaded = fresh_process(names)
    assert "deepseek_arch.models.causal_lm" in loaded  # the names above were resolved
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
