"""Files beside the weights that belong to a checkpoint: tokenizer, chat template, generation defaults, code."""

from __future__ import annotations

from pathlib import Path

from .shards import INDEX_NAME

__all__ = ["companions"]

_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def companions(folder: Path) -> list[Path]:
    """Returns the small files that go with a checkpoint when it is copied; hidden files do not."""
    weights = ("config.json", INDEX_NAME)
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in weights and file.name[0] != "."
    )
