"""Operators are laid out alike: one set of file names, one direction of imports, no way past an operator's entry."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import deepseek_kernels
from deepseek_kernels.testing.compile_gate import operators

KERNELS = Path(deepseek_kernels.__file__).parent
ROOT = KERNELS.parent.parent

# kernels/README.md has the content of each.
FILES = {"__init__", "reference", "kernel", "backward", "launch", "configs", "compile_cases", "cpu"}
# Each imports only its own and those before it.
FAMILIES = ["quant", "norm", "gemm", "moe", "attention", "loss"]
ORDER = [{"dispatch", "common"}, {"testing"}, *({family} for family in FAMILIES)]
# By file, the files of its own and of other operators that it may import; packages, which are entries, everywhere.
MAY_IMPORT = {
    "configs": {"configs"},
    "kernel": {"configs", "kernel"},
    "backward": {"configs", "kernel", "backward"},
    "reference": {"configs", "backward", "reference"},
    "cpu": {"configs", "reference", "cpu"},
    "launch": {"configs", "kernel", "backward", "reference", "launch"},
    "compile_cases": {"configs", "kernel", "backward", "compile_cases"},
    "__init__": {"configs", "reference", "launch", "cpu"},
}

FOLDERS = sorted(path.parent for family in FAMILIES for path in (KERNELS / family).glob("*/__init__.py"))
MODULES = sorted(KERNELS.rglob("*.py"))


def name_of(path: Path, root: Path = KERNELS.parent) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


@cache
def imported(path: Path, root: Path = KERNELS.parent) -> frozenset[str]:
    """The modules of deepseek_kernels that a file imports, inside functions too."""
    package = path.parent.relative_to(root).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in NAMES else base for alias in node.names}
    return frozenset(found & set(NAMES))


def test_there_are_operators():
    assert {folder.parent.name for folder in FOLDERS} == set(FAMILIES) and len(FOLDERS) > 15


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_operator_has_files_of_the_fixed_names(folder):
    files = {path.stem for path in folder.glob("*.py")}
    assert files <= FILES
    # Kernels are launched from one file, and the compile gate has their cases.
    assert ("kernel" in files) == ("launch" in files) == ("compile_cases" in files) == (folder.name in operators())
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("folder", [KERNELS / family for family in FAMILIES], ids=lambda folder: folder.name)
def test_a_family_has_nothing_but_operators(folder):
    assert [path.name for path in folder.glob("*.py")] == ["__init__.py"]


def place(name: str) -> int:
    """The position in ORDER of the folder that a module is in."""
    return next(i for i, folders in enumerate(ORDER) if name.split(".")[1] in folders)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    if name == "deepseek_kernels":
        return
    for other in imported(path) - {"deepseek_kernels"}:
        assert place(other) <= place(name), f"{name} imports {other}"
    if path.parent in FOLDERS:
        allowed = MAY_IMPORT[path.stem]
        for other in imported(path):
            if NAMES[other].parent in FOLDERS and NAMES[other].stem != "__init__":
                assert NAMES[other].stem in allowed, f"{name} imports {other}"


def test_there_are_no_circles():
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(imported(NAMES[name])):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(NAMES):
        visit(name, ())


@pytest.mark.parametrize("package", ["kernels/deepseek_kernels", "deepseek_arch"])
def test_no_reference_is_imported_past_its_operator(package):
    """The operator's `__init__` exports what others need of it."""
    root = (ROOT / package).parent
    past = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for other in imported(path, root):
            if other.endswith(".reference") and NAMES[other].parent != path.parent:
                past.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not past


def test_public_names_are_shown_by_family():
    """`help(deepseek_kernels)` begins with them."""
    shown = re.findall(r"\b\w+\b", deepseek_kernels.__doc__)
    for name in deepseek_kernels.__all__:
        assert shown.count(name) == 1, name
        assert getattr(deepseek_kernels, name) is not None


def test_the_readme_has_every_operator():
    rows = re.findall(r"^\| `(\w+/\w+)` \|", (ROOT / "kernels" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(f"{folder.parent.name}/{folder.name}" for folder in FOLDERS)
