"""Reasons to keep a sample out of the training data (arXiv 2501.12948, section 3.3 and supplement B.3)."""

from __future__ import annotations

from dataclasses import dataclass

from ..language import consistency
from ..problems import Problem
from ..rewards.rules import _words, repeated_share
from ..templates import Parsed

__all__ = ["Filters"]


@dataclass(frozen=True)
class Filters:
    """Thresholds for samples that are right already.

    Attributes:
        consistency: least share of words in the problem's language, or None for any language.
        repeated: largest share of words in repeated n-grams.
        ngram: words of those.
        max_tokens: of a sample, or None.
        longest_paragraph: words of one, or None.
        code: whether code blocks in the thoughts are allowed.
    """

    consistency: float | None = 0.95
    repeated: float = 0.5
    ngram: int = 12
    max_tokens: int | None = None
    longest_paragraph: int | None = None
    code: bool = False

    def __post_init__(self) -> None:
        if self.consistency is not None and not 0 <= self.consistency <= 1:
            raise ValueError(f"expected consistency in [0, 1] or None, got {self.consistency}")
        if not 0 <= self.repeated <= 1 or self.ngram < 1:
            raise ValueError(f"expected repeated in [0, 1] and ngram >= 1, got {self.repeated} and {self.ngram}")

    def reason(self, parsed: Parsed, problem: Problem, tokens: int, ended: bool) -> str | None:
        """Returns what is wrong with a sample, in a word; None for one to keep."""
        thought = parsed.thought or ""
        if not ended:
            return "cut off"
        if parsed.faults:
            return "form"
        if self.max_tokens is not None and tokens > self.max_tokens:
            return "length"
        if self.consistency is not None and problem.language is not None:
            share = consistency(parsed.prose, problem.language)
            if share is not None and share < self.consistency:
                return "language"
        if repeated_share(_words(thought), self.ngram) > self.repeated:
            return "repetition"
        if not self.code and "```" in thought:
            return "code"
        longest = max((len(_words(part)) for part in thought.split("\n\n")), default=0)
        if self.longest_paragraph is not None and longest > self.longest_paragraph:
            return "paragraph"
        return None
