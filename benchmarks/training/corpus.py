"""Text to train on: the files of this repository as bytes, and random or evenly spread pieces of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..core.workers import ROOT

__all__ = ["file_text", "random_rows", "repository_text", "spread_rows"]

_PATTERNS = ("deepseek_arch/**/*.py", "kernels/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "*.md")


def repository_text() -> Tensor:
    """Returns the repository's files, one after another, as token ids uint8 [N]: one token is one byte."""
    paths = sorted({path for pattern in _PATTERNS for path in ROOT.glob(pattern)})
    return _tokens(b"\n".join(path.read_bytes() for path in paths))


def file_text(path: str | Path) -> Tensor:
    """Returns the bytes of a file as token ids uint8 [N]."""
    return _tokens(Path(path).read_bytes())


def _tokens(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def random_rows(text: Tensor, rows: int, length: int, draw: torch.Generator) -> Tensor:
    """Returns pieces of `text` from random places, int64 [rows, length]."""
    return _pieces(text, torch.randint(len(text) - length + 1, (rows,), generator=draw), length)


def spread_rows(text: Tensor, rows: int, length: int) -> Tensor:
    """Returns pieces of `text` from evenly spread places, int64 [rows, length].

    Raises:
        ValueError: the text is shorter than a row.
    """
    if len(text) < length:
        raise ValueError(f"expected at least {length} tokens of text, got {len(text)}")
    return _pieces(text, torch.linspace(0, len(text) - length, rows).long(), length)


def _pieces(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()
