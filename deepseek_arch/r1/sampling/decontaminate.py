"""Removal of training questions that share word sequences with evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..language import UNSPACED
from .rows import Row

__all__ = ["decontaminate", "ngrams"]

_WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def ngrams(text: str, size: int = 10) -> set[tuple[str, ...]]:
    """Returns the sequences of `size` words in `text`, case ignored; a shorter text is one sequence.

    Each character of a script that is written without spaces, such as Chinese, is a word.
    """
    words = _WORDS.findall(text.casefold())
    if len(words) <= size:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def decontaminate(rows: Sequence[Row], evaluations: Iterable[str], size: int = 10) -> list[Row]:
    """Returns the rows whose questions share no sequence of `size` words with an evaluation (arXiv 2501.12948, B.3).

    Raises:
        ValueError: size below 1.
    """
    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}")
    forbidden = {gram for text in evaluations for gram in ngrams(text, size)}
    return [row for row in rows if not ngrams(row.question, size) & forbidden]
