"""R1's rule rewards: accuracy, format, language consistency, repetition and length (arXiv 2501.12948, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..language import consistency
from ..problems import Problem, ProblemSet
from ..templates import TEMPLATES, Template, up_to_end
from .answers import grade
from .base import Reward

__all__ = ["Accuracy", "Format", "Language", "Overlong", "Repetition"]


def _template(template: Template | str) -> Template:
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"expected a template among {', '.join(TEMPLATES)}, got {template!r}")
    return TEMPLATES[template]


def _chosen(kinds: Sequence[str] | None) -> Sequence[str] | None:
    if isinstance(kinds, str):
        raise ValueError(f"expected a list of kinds, got {kinds!r}")
    return kinds


class Accuracy(Reward):
    """1 for a response whose only final answer is right, else 0; None for problems without a reference.

    The answer is read behind the thoughts (TRAPS T7), whatever else is wrong with the form: the format has a reward of
    its own. A response with two final answers has none.

    Args:
        template: the form of the responses, or its name in `templates.TEMPLATES`.
        problems: the source of the problems, if it grades by rules of its own rather than by `answers.GRADERS`.
    """

    columns = ("answer", "kind", "grader", "data")

    def __init__(self, template: Template | str, problems: ProblemSet | None = None) -> None:
        super().__init__("accuracy")
        self.template, self.problems = _template(template), problems

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        if row["kind"] != "reasoning" or row["answer"] is None:
            return None
        parsed = self.template.parse(text)
        answer = parsed.answer
        tagged = self.template.style == "tags" and "<answer>" in up_to_end(text)
        if row["grader"] == "code" and (answer is None or "```" not in answer) and not tagged:
            answer = parsed.summary if parsed.thought is not None or self.template.style == "boxed" else answer
        if answer is None:
            return 0.0
        if self.problems is not None:
            problem = Problem("-", row["answer"], kind=row["kind"], grader=row["grader"], data=row["data"])
            return self.problems.grade(answer, problem)
        return grade(answer, row["answer"], row["grader"], row["data"])

    def judge(self, text: str, problem: Problem) -> float | None:
        """Returns the reward of a response to `problem`."""
        row = {"answer": problem.answer, "kind": problem.kind, "grader": problem.grader, "data": problem.data}
        return self.score(text, row)


class Format(Reward):
    """1 for a well-formed response, else 0; None for problems of other kinds.

    Args:
        template: as for `Accuracy`.
        kinds: of the problems that it applies to, None for all: a greeting may be answered without thoughts.
    """

    columns = ("answer", "kind", "grader")

    def __init__(self, template: Template | str, kinds: Sequence[str] | None = None) -> None:
        super().__init__("format")
        self.template, self.kinds = _template(template), _chosen(kinds)

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        if self.kinds is not None and row["kind"] not in self.kinds:
            return None
        boxed = row["kind"] == "reasoning" and row["answer"] is not None and row["grader"] != "code"
        return float(not self.template.parse(text, needs_answer=boxed).faults)


class Language(Reward):
    """The share of words in the problem's language, 0 for a response without words; None for problems of any language.

    Args:
        template: as for `Accuracy`.
        reads: "thought", as the paper's formula, or "all", thoughts and summary: with the first, summaries may drift
            into another language.
        kinds: of the problems that it applies to, None for all: the answer to a request for a translation is in another
            language than the request.
    """

    columns: tuple[str, ...] = ("language",)

    def __init__(self, template: Template | str, reads: str = "all", kinds: Sequence[str] | None = None) -> None:
        super().__init__("language")
        if reads not in ("thought", "all"):
            raise ValueError(f"expected reads 'thought' or 'all', got {reads!r}")
        self.template, self.reads, self.kinds = _template(template), reads, _chosen(kinds)
        if kinds is not None:
            self.columns = ("language", "kind")

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        if row["language"] is None or (self.kinds is not None and row["kind"] not in self.kinds):
            return None
        parsed = self.template.parse(text)
        read = parsed.prose if self.reads == "all" else parsed.thought or ""
        return consistency(read, row["language"]) or 0.0


class Repetition(Reward):
    """Minus the share of the words that are in an n-gram which stood there before; 0 for a text without repetition.

    Args:
        template: as for `Accuracy`.
        size: words of an n-gram. Words are split at spaces, texts without spaces character by character.
        free: the share that costs nothing: lists and equations repeat themselves.
    """

    def __init__(self, template: Template | str, size: int = 12, free: float = 0.2) -> None:
        super().__init__("repetition")
        if size < 1 or not 0 <= free < 1:
            raise ValueError(f"expected size >= 1 and free in [0, 1), got {size} and {free}")
        self.template, self.size, self.free = _template(template), size, free

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        text = up_to_end(text)
        if self.template.style == "tags":
            text = text.partition("</answer>")[0]
        share = repeated_share(_words(text), self.size)
        return -max(0.0, share - self.free) / (1 - self.free)


_MOST_WORDS = 1 << 16  # of the longest texts only the start is looked at


def _words(text: str) -> Sequence[str]:
    """Returns the words of a text, the characters of one that has hardly any spaces."""
    words = text.split()
    return (text if len(text) > 40 * max(1, len(words)) else words)[:_MOST_WORDS]


def repeated_share(words: Sequence[str], size: int) -> float:
    """Returns the share of `words` that are part of a repeated n-gram of `size` words, from the second time on."""
    seen: set[int] = set()  # hashes: n-grams of a million words would be a copy of the text for each position
    covered, until = 0, 0
    for start in range(len(words) - size + 1):
        gram = hash(tuple(words[start : start + size]))
        if gram in seen:
            covered += start + size - max(until, start)
            until = start + size
        seen.add(gram)
    return covered / len(words) if words else 0.0


class Overlong(Reward):
    """0 up to `limit` - `margin` tokens, falling to -1 at `limit` (arXiv 2503.14476, equation 13).

    Args:
        limit: tokens of the longest completion.
        margin: tokens before it in which the penalty grows.
    """

    def __init__(self, limit: int, margin: int) -> None:
        super().__init__("overlong")
        if not 0 < margin <= limit:
            raise ValueError(f"expected 0 < margin <= limit, got {margin} and {limit}")
        self.limit, self.margin = limit, margin

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        if "completion_ids" not in row:
            raise ValueError("expected completion_ids for the reward on length, got none")
        return -min(1.0, max(0.0, (len(row["completion_ids"]) - (self.limit - self.margin)) / self.margin))
