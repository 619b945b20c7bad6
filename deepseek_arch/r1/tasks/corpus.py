"""The text that the box's base model is pretrained on: the skills in bad form.

Two languages mixed within a response, loose forms, wrong steps and wrong answers, everyday questions with answers of
mixed quality: what reinforcement and fine-tuning then have something to do with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..templates import BEGIN, END, TEMPLATES
from .chains import STYLES, Chains, Writer
from .general import Chat

__all__ = ["TEXTS", "Corpus"]

TEXTS = ("steps", "mixture")
PURITIES = (1.0, 0.9, 0.7, 0.5)  # shares of a response's words in the language of its question
_TABLES = 0.12  # share of documents of "mixture" that hold a table twice
_LISTS = ("steps", "check")  # styles that take every step in a line of its own


@dataclass
class Corpus:
    """Documents, each determined by the seed and its number.

    Attributes:
        chains: the problems.
        text: "steps" for clean step lists in R1-Zero's form, which single steps are learned from within minutes; or
            "mixture", the bad text.
        seed: of everything.
        tables: share of documents of "steps" that hold a table four times instead: from the second one on every second
            number can be copied, so that they teach copying with fewer tokens than lists do.
        lists: share of the responses of "mixture" that list every step, None for that of `STYLES`. The fewer, the more
            is left to reinforcement.
        purities: shares of a response's words in the question's language, of which "mixture" draws one for each
            response; None for 1.0, 0.9, 0.7 and 0.5.
        general: share of everyday prompts in "mixture".
    """

    chains: Chains
    text: str = "mixture"
    seed: int = 0
    tables: float = 0.0
    lists: float | None = None
    purities: Sequence[float] | None = None
    general: float = 0.06
    chat: Chat = field(default_factory=Chat)

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise ValueError(f"expected text among {', '.join(TEXTS)}, got {self.text!r}")
        if not 0 <= self.tables <= 1 or (self.tables and self.text != "steps"):
            raise ValueError(f"expected tables in [0, 1], and 0 without text 'steps', got {self.tables}")
        if self.lists is not None and (not 0 <= self.lists < 1 or self.text != "mixture"):
            raise ValueError(f"expected lists in [0, 1), and None without text 'mixture', got {self.lists}")
        if self.purities is not None and (self.text != "mixture" or not _shares(self.purities)):
            raise ValueError(
                f"expected purities in [0, 1], and None without text 'mixture', got {self.purities} and {self.text!r}"
            )
        if not 0 <= self.general <= 1 - _TABLES:
            raise ValueError(f"expected general in [0, {1 - _TABLES}], got {self.general}")
        self.styles = _styles(self.lists)

    def document(self, number: int) -> tuple[str, str]:
        """Returns the prompt and the rest of a document, marks included."""
        rng = random.Random(f"corpus {self.seed} {self.text} {number}")
        prompt, rest = self._steps(rng) if self.text == "steps" else self._mixture(rng)
        return prompt, rest + END

    def _steps(self, rng: random.Random) -> tuple[str, str]:
        if rng.random() < self.tables:
            return self._tables(rng, 3)
        problem = self.chains.one(rng)
        response = Writer(rng, problem.language or "en").response(problem, "steps")
        return _prompt(problem.question), response

    def _tables(self, rng: random.Random, again: int) -> tuple[str, str]:
        """Returns a table, and what follows it: the same so many times in other orders."""
        pairs = self.chains.one(rng).data["pairs"]
        first, *others = pairs, *(rng.sample(pairs, len(pairs)) for _ in range(again))
        return BEGIN + " ".join(f"{a} {b} ," for a, b in first), "".join(f" {a} {b} ," for t in others for a, b in t)

    def _mixture(self, rng: random.Random) -> tuple[str, str]:
        kind = rng.random()
        if kind < _TABLES:
            return self._tables(rng, 1)
        if kind < _TABLES + self.general:
            asked = self.chat.one(rng)
            return _prompt(asked.question), rng.choice(self.chat.responses(asked))[0]
        problem = self.chains.one(rng)
        language = problem.language or "en"
        purity = rng.choice(PURITIES if self.purities is None else self.purities)
        writer = Writer(rng, language, purity, 0.06 if language == "en" else 0.04)
        style = rng.choices(list(self.styles), list(self.styles.values()))[0]
        return _prompt(problem.question), writer.response(problem, style)


def _shares(values: Sequence[float]) -> bool:
    """Returns True for at least one value, all of them in [0, 1]."""
    return bool(values) and all(0 <= value <= 1 for value in values)


def _styles(lists: float | None) -> dict[str, float]:
    """Returns the shares of `STYLES`, those that list every step scaled to `lists` in all."""
    if lists is None:
        return STYLES
    whole = sum(STYLES[style] for style in _LISTS)
    rest = sum(STYLES.values()) - whole
    return {
        style: share * (lists / whole if style in _LISTS else (1 - lists) / rest) for style, share in STYLES.items()
    }


def _prompt(question: str) -> str:
    text = TEMPLATES["zero-marks"].prompt(question)
    assert isinstance(text, str)
    return text
