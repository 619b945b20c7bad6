"""Surroundings of a stage beside its arguments, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DATA", "LOG", "METRICS", "MODEL", "SAMPLES", "StageContext", "write_json", "write_lines"]

MODEL, METRICS, SAMPLES, LOG, DATA, WORK = (
    "model", "metrics.json", "samples.jsonl", "log.jsonl", "data.jsonl", "work"
)  # fmt: skip


@dataclass(frozen=True)
class StageContext:
    """Place in which a stage works.

    Attributes:
        name: the stage's.
        folder: of its results. A run that was interrupted here goes on.
        find: the folder of another stage's results by its name, or a path as it is.
        seed: of everything that the stage draws.
        progress: whether bars are drawn.
    """

    name: str
    folder: Path
    find: Callable[[str], Path]
    seed: int = 0
    progress: bool = False

    @property
    def work(self) -> Path:
        """Folder of what is needed only until the stage is done, as checkpoints."""
        return self.folder / WORK

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.folder / MODEL

    def model_of(self, name: str) -> Path | str:
        """Returns the folder of another stage's model, a path to a model as it is, or a model's name on the Hub.

        Raises:
            ValueError: there is no model.
        """
        folder = self.find(name)
        if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return name
        folder = folder / MODEL if (folder / MODEL).is_dir() else folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"expected a stage or a folder with a model for {self.name!r}, got {name!r} without one")
        return folder


def write_json(value: Any, path: Path) -> None:
    """Writes `value`; a reader finds the old file or the new one, whole."""
    _write(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", path)


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes JSON Lines, whole or not at all."""
    _write("".join(json.dumps(dict(row), ensure_ascii=False, sort_keys=True) + "\n" for row in rows), path)


def _write(text: str, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
