"""Docstrings and references of the whole repository: what a reader can be asked to follow."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("deepseek_arch", "kernels", "tests", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))))
QUESTION = re.compile(r"(What|Whether|Who|Whose|Where|How|Which|Why|When)\b")
# Rows of the traps that the repository ships: "| A1 | ...".
TRAPS = set(re.findall(r"^\| ([A-Z]\d+) \|", (ROOT / "deepseek_arch" / "TRAPS.md").read_text(encoding="utf-8"), re.M))
REFERENCE = re.compile(r"TRAPS((?:,? (?:and |to )?[A-Z]\d+)+)")
# Documents that other projects or people have, and this repository has not.
ELSEWHERE = re.compile(r"\b(FIGURES|TENSORS|KERNELS|DESIGN|HOUSE|STYLE|SCALE|CPU|HF|R1)\.md\b|\b(FIGURES|TENSORS) \d")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every docstring, test functions' too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((getattr(node, "lineno", 1), text))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_docstrings_open_with_a_verb_or_a_noun_phrase(path):
    questions = [f"line {line}: {text.splitlines()[0]}" for line, text in docstrings(path) if QUESTION.match(text)]
    assert not questions


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=relative)
def test_references_can_be_followed(path):
    if path == Path(__file__).resolve():
        return
    text = path.read_text(encoding="utf-8")
    named = {row for rows in REFERENCE.findall(text) for row in re.findall(r"[A-Z]\d+", rows)}
    assert named <= TRAPS, f"rows that deepseek_arch/TRAPS.md has not: {sorted(named - TRAPS)}"
    assert not ELSEWHERE.findall(text)


def test_the_traps_are_numbered_once():
    rows = re.findall(r"^\| ([A-Z]\d+) \|", (ROOT / "deepseek_arch" / "TRAPS.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(set(rows)) > 100
