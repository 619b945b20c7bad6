"""Equality of mathematical expressions by math-verify, in a process of its own."""

from __future__ import annotations

import importlib.util

from ..answer_process import AnswerProcess

__all__ = ["close", "equal_expressions"]

_JUDGE = r"""
from math_verify import parse, verify

def judge(answer, reference):
    gold, given = (parse("\\boxed{" + text + "}", parsing_timeout=4) for text in (reference, answer))
    return bool(gold and given and verify(gold, given, timeout_seconds=4))
"""
_process = AnswerProcess("math-verify", _JUDGE, seconds=10.0)  # parsing and comparing have 4 s each in there


def equal_expressions(answer: str, reference: str) -> bool:
    """Returns True where math-verify finds both LaTeX expressions equal.

    An answer with unbalanced braces, or one that takes ten seconds or too much memory, is not.

    Raises:
        ImportError: math-verify is missing.
    """
    if not _balanced(answer):
        return False
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            "expected math-verify to compare expressions that are no plain numbers, got none: "
            'pip install "deepseek-arch[r1]"'
        )
    return _process.judge(answer, reference)


def _balanced(text: str) -> bool:
    """Returns True where braces close in order: an answer must not end the box that it is compared in."""
    depth, escaped = 0, False
    for character in text:
        if escaped or character == "\\":
            escaped = not escaped
            continue
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def close() -> None:
    """Ends the process, if it runs; the next comparison starts another one."""
    _process.close()
