"""Statistics over problems, and measures of single responses."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..rewards import number_of

__all__ = ["REFLECTIONS", "Interval", "mean_interval", "reflections", "vote"]

REFLECTIONS = (
    "wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
    "等等", "错误", "然而", "但是", "重试", "验证", "不 对", "不对", "检查",
)  # fmt: skip
"""The paper's ten words of reflection (arXiv 2501.12948, supplement C.2), and Chinese words for them."""

_ENGLISH = re.compile(r"\b(?:" + "|".join(w for w in REFLECTIONS if w.isascii()) + r")\b", re.IGNORECASE)
_CHINESE = re.compile("|".join(w for w in REFLECTIONS if not w.isascii()))


@dataclass(frozen=True)
class Interval:
    """A mean over problems with the half-width of its 95 % interval.

    Attributes:
        mean: the mean.
        half_width: 1.96 standard errors; infinite for a single problem.
        count: problems.
    """

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean of one value a problem.

    Samples of one problem are not independent: their mean goes in as one value, and the interval is over problems.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if not count:
        raise ValueError("expected values of at least one problem, got none")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, 1.96 * math.sqrt(variance / count), count)


def reflections(text: str) -> int:
    """Returns how many words of reflection there are in `text`."""
    return len(_ENGLISH.findall(text)) + len(_CHINESE.findall(text))


def vote(answers: Sequence[str | None]) -> str | None:
    """Returns the answer that most samples gave, the earliest one among equals; None where none gave any.

    Numbers are the same whatever they are written like, other answers up to spacing and case.
    """
    keys = [None if answer is None else _key(answer) for answer in answers]
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return None
    winner = max(counts, key=counts.__getitem__)  # dicts keep the order of the first sight
    return answers[keys.index(winner)]


def _key(answer: str) -> str:
    number = number_of(answer)
    text = unicodedata.normalize("NFKC", answer)
    return str(number) if number is not None else " ".join(text.split()).casefold()
