"""Rows of supervised data, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "read_rows", "write_rows"]


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        question: without any template.
        prompt: text, or a conversation.
        completion: text behind the prompt, without its end token.
        language: of the question, or None.
        kind: of the problem.
    """

    question: str
    prompt: str | list[dict[str, Any]]
    completion: str
    language: str | None = None
    kind: str = "reasoning"


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Writes rows as JSON Lines: all of them, or, where that fails, no file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def read_rows(path: str | Path) -> list[Row]:
    """Reads what `write_rows` wrote.

    Raises:
        ValueError: a line that is no row.
        OSError: no such file.
    """
    rows = []
    # Not splitlines: texts may hold other characters that end lines for it, as U+2028.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"expected rows of training data in {path}, got line {number}: {line[:60]!r}") from error
    return rows
