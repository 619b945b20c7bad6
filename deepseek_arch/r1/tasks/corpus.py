"""The text that the box's base model is pretrained on: the skills in bad form.

Two languages mixed within a response, loose forms, wrong steps and wrong answers, everyday questions with answers of
mixed quality: what reinforcement and fine-tuning then have something to do with.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ..templates import BEGIN, END, TEMPLATES
from .chains import STYLES, Chains, Writer
from .general import Chat

__all__ = ["TEXTS", "Corpus"]

TEXTS = ("steps", "mixture")


@dataclass
class Corpus:
    """Documents, each determined by the seed and its number.

    Attributes:
        chains: the problems.
        text: "steps" for clean step lists in R1-Zero's form, which single steps are learned from within minutes; or
            "mixture", the bad text.
        seed: of everything.
    """

    chains: Chains
    text: str = "mixture"
    seed: int = 0
    chat: Chat = field(default_factory=Chat)

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise ValueError(f"expected text among {', '.join(TEXTS)}, got {self.text!r}")

    def document(self, number: int) -> tuple[str, str]:
        """Returns the prompt and the rest of a document, marks included."""
        rng = random.Random(f"corpus {self.seed} {self.text} {number}")
        prompt, rest = self._steps(rng) if self.text == "steps" else self._mixture(rng)
        return prompt, rest + END

    def _steps(self, rng: random.Random) -> tuple[str, str]:
        problem = self.chains.one(rng)
        response = Writer(rng, problem.language or "en").response(problem, "steps")
        return _prompt(problem.question), response

    def _mixture(self, rng: random.Random) -> tuple[str, str]:
        kind = rng.random()
        if kind < 0.12:  # tables, written twice in another order, as any corpus has
            pairs = self.chains.one(rng).data["pairs"]
            again = rng.sample(pairs, len(pairs))
            return BEGIN, " ".join(f"{a} {b} ," for a, b in [*pairs, *again])
        if kind < 0.18:
            asked = self.chat.one(rng)
            return _prompt(asked.question), rng.choice(self.chat.responses(asked))[0]
        problem = self.chains.one(rng)
        language = problem.language or "en"
        writer = Writer(rng, language, rng.choice((1.0, 0.9, 0.7, 0.5)), 0.06 if language == "en" else 0.04)
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        return _prompt(problem.question), writer.response(problem, style)


def _prompt(question: str) -> str:
    text = TEMPLATES["zero-marks"].prompt(question)
    assert isinstance(text, str)
    return text
