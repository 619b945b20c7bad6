"""Rules that compare an answer with a reference: numbers, mathematics, multiple choice, text and programs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from .code import grade_code
from .math_process import equal_expressions

__all__ = [
    "GRADERS",
    "LONGEST_ANSWER",
    "grade",
    "grade_choice",
    "grade_math",
    "grade_number",
    "grade_text",
    "number_of",
]

LONGEST_ANSWER = 1000
"""Characters of an answer that is looked at; longer ones are wrong. Programs have a limit of their own."""

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"))
_DECORATION = re.compile(r"\\[,;:!]|\\left|\\right|\$")
# An exponent has at most three digits: 1e999999999 is a number that no machine should write out.
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,3}(?:,\d{3})+|\d{1,300})?(\.\d{1,300})?(?:[eE]([+-]?\d{1,3}))?", re.ASCII)
_RATIO = re.compile(r"([+-]?)\s*(\d{1,300})\s*/\s*(\d{1,300})", re.ASCII)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boldsymbol)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[\])]?\s*[.:]?", re.ASCII)
# "3 or 4", "1, 2, 3", "x = 3 = 4" and "3 \\to 4" must not pass for one of their parts.
_SEVERAL = re.compile(
    r"\b(?:or|and)\b|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}|[,;|&~、]|或|和|=.*=|\\\\|"
    r"\\(?:lor|vee|land|wedge|pm|mp|to|mapsto|sim|equiv|implies|iff|boxed|fbox|(?:long)?(?:left)?rightarrow)(?![a-z])",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """Returns `text` with compatible characters unified, minus signs alike, and spacing of LaTeX left out."""
    return _DECORATION.sub("", unicodedata.normalize("NFKC", text).translate(_MINUS)).strip()


def number_of(text: str) -> Fraction | None:
    """Returns the rational number that `text` is: an integer, a decimal, or a ratio of integers; None for all else.

    Thousands may be separated by commas, digits may be full-width, and a full stop may end the text. Spaces separate
    numbers: "3 4" is none.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    text = _plain(text).removesuffix(".").rstrip()
    ratio = _RATIO.fullmatch(text)
    if ratio:
        return Fraction(int(ratio[1] + ratio[2]), int(ratio[3])) if int(ratio[3]) else None
    match = _NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    digits = (match[2] or "0").replace(",", "") + (match[3] or "")
    return Fraction(f"{match[1]}{digits}e{match[4] or 0}")


def grade_number(answer: str, reference: str, data: Mapping[str, Any]) -> float:
    """Returns 1.0 where both are the same rational number.

    Raises:
        ValueError: a reference that is no number.
    """
    expected = number_of(reference)
    if expected is None:
        raise ValueError(f"expected a reference answer that is a number, got {reference[:80]!r}")
    return float(number_of(answer) == expected)


def grade_math(answer: str, reference: str, data: Mapping[str, Any]) -> float:
    """Returns 1.0 where both are the same mathematical object.

    Rational numbers are compared here; everything else by math-verify, in a process of its own.

    Raises:
        ImportError: math-verify is needed and missing.
    """
    if len(answer) > LONGEST_ANSWER:
        return 0.0
    if _plain(answer) == _plain(reference):
        return 1.0
    value, expected = number_of(answer), number_of(reference)
    if value is not None and expected is not None:
        return float(value == expected)
    if not _plain(answer) or (_says_several(answer) and not _says_several(reference)):
        return 0.0
    return float(equal_expressions(answer.translate(_MINUS), reference.translate(_MINUS)))


def _says_several(text: str) -> bool:
    """Returns True for a list, a choice, or an equation of numbers: math-verify would take one part of it."""
    text = _plain(text)
    left, equals, _ = text.partition("=")
    return _SEVERAL.search(text) is not None or (bool(equals) and number_of(left) is not None)


def grade_choice(answer: str, reference: str, data: Mapping[str, Any]) -> float:
    """Returns 1.0 for an answer that is the reference's letter, alone or in the form "(B)", "B." or "B: text".

    Args:
        data: "choices", the texts by letter, where an answer may repeat the chosen text.

    Raises:
        ValueError: a reference that is no letter.
    """
    expected = _LETTER.fullmatch(_plain(_WRAPPED.sub(r"\1", reference)))
    if expected is None:
        raise ValueError(f"expected a reference answer that is a letter, got {reference[:80]!r}")
    if len(answer) > LONGEST_ANSWER:
        return 0.0
    text = _plain(_WRAPPED.sub(r"\1", answer))
    choices = {letter.upper(): _folded(choice) for letter, choice in dict(data.get("choices") or {}).items()}
    right = expected[1].upper()
    found = _LETTER.fullmatch(text)
    if found is None and choices:  # "B) Paris": the letter and its own text
        start = _LETTER.match(text)
        if start is not None and _folded(text[start.end() :]) == choices.get(start[1].upper()):
            found = start
    return float(found is not None and found[1].upper() == right)


def grade_text(answer: str, reference: str, data: Mapping[str, Any]) -> float:
    """Returns 1.0 for the same text up to case, spacing and compatible characters."""
    return float(len(answer) <= LONGEST_ANSWER and _folded(answer) == _folded(reference))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


Grader = Callable[[str, str, Mapping[str, Any]], float]

GRADERS: dict[str, Grader] = {
    "number": grade_number,
    "math": grade_math,
    "choice": grade_choice,
    "text": grade_text,
    "code": grade_code,
}
"""Rules by name: (answer, reference answer, the problem's data) -> 1.0 or 0.0."""


def grade(answer: str, reference: str | None, grader: str, data: Mapping[str, Any] | None = None) -> float | None:
    """Returns what the rule `grader` says, None where there is no reference to compare with.

    Raises:
        ValueError: an unknown rule.
    """
    if grader not in GRADERS:
        raise ValueError(f"expected a grader among {', '.join(GRADERS)}, got {grader!r}")
    return None if reference is None else GRADERS[grader](answer, reference, data or {})
