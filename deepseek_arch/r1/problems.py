"""Problems, and the sets that they are drawn from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

__all__ = ["KINDS", "SPLITS", "Problem", "ProblemSet", "check_split"]

KINDS = ("reasoning", "general", "harmless")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Problem:
    """One prompt with what is needed to judge its answers.

    Attributes:
        question: the text of the prompt, without any template.
        answer: the reference answer, or None where no rule can judge an answer.
        language: code of the language that the answer is expected in, a key of `language.SCRIPTS_OF`; None for any.
        kind: one of `KINDS`. Rule rewards apply to "reasoning", preference rewards to the others.
        grader: name of the rule that compares answers (`rewards.GRADERS`).
        data: further values that the grader reads, as JSON can hold them.
    """

    question: str
    answer: str | None = None
    language: str | None = None
    kind: str = "reasoning"
    grader: str = "math"
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected a kind among {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"expected a question with text, got {self.question!r}")
        if self.answer is not None and not isinstance(self.answer, str):
            raise ValueError(f"expected an answer that is a string or None, got {type(self.answer).__name__}")

    def columns(self) -> dict[str, str | None]:
        """Returns the columns of a training set that rewards read; all are strings or None, as Arrow prefers."""
        return {
            "answer": self.answer,
            "language": self.language,
            "kind": self.kind,
            "grader": self.grader,
            "data": json.dumps(dict(self.data), ensure_ascii=False, sort_keys=True),
        }


@runtime_checkable
class ProblemSet(Protocol):
    """A source of problems: generated, or read from a table.

    Problems of the "test" split never appear in the "train" split, whatever the seeds.
    """

    name: str

    def draw(self, count: int, seed: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems, the same ones for the same seed.

        Raises:
            ValueError: an unknown split, or a source with fewer problems than that.
        """
        ...

    def grade(self, answer: str, problem: Problem) -> float | None:
        """Returns 1.0 for a right answer, 0.0 for a wrong one, None where no rule applies."""
        ...


def check_split(split: str, splits: Sequence[str] = SPLITS) -> None:
    """Raises ValueError unless `split` is one of `splits`."""
    if split not in splits:
        raise ValueError(f"expected a split among {', '.join(splits)}, got {split!r}")
