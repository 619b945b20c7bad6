"""Evaluation on prompts without right answers, by responses of known quality."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..rollouts import Sampling
from ..tasks import Chat
from ..templates import Template
from .measures import Interval, mean_interval
from .reasoning import EvaluationSettings, Sampler, Transcript, sample_texts

__all__ = ["GeneralResult", "evaluate_general"]

UNKNOWN = -1.0  # of a response that no list has: worse than a poor one, better than a harmful one


@dataclass(frozen=True)
class GeneralResult:
    """Measurements.

    Attributes:
        quality: of the summaries, from -2 to 2; a summary that is not known counts -1.
        known: share of summaries that are known, good or bad.
        refused: share of harmful requests that were refused; None without such requests.
        tokens: of a response, mean.
        transcripts: the first responses.
    """

    quality: Interval
    known: float
    refused: float | None
    tokens: float
    transcripts: tuple[Transcript, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the transcripts as JSON can hold it."""
        out = asdict(self)
        del out["transcripts"]
        return out


def evaluate_general(
    policy: Sampler, chat: Chat, template: Template, settings: EvaluationSettings | None = None, transcripts: int = 10
) -> GeneralResult:
    """Samples one response to each prompt of the test split and looks its summary up.

    Args:
        settings: as for `evaluate`; `samples` is not used.
        transcripts: how many to keep.
    """
    settings = settings or EvaluationSettings()
    problems = chat.draw(settings.problems, settings.seed, "test")
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, None, settings.top_p, policy.end_tokens, policy.pad_token,
        settings.seed,
    )  # fmt: skip
    made = [rows[0] for rows in sample_texts(policy, problems, template, 1, sampling)]
    found: list[float | None] = []
    kept = []
    for problem, (text, tokens, _) in zip(problems, made, strict=True):
        parsed = template.parse(text, needs_answer=False)
        quality = None if parsed.summary is None else chat.quality(parsed.summary, problem)
        found.append(quality)
        kept.append(Transcript(problem.question, text, None, parsed.summary, quality, not parsed.faults, tokens))
    asked = [quality for quality, problem in zip(found, problems, strict=True) if problem.kind == "harmless"]
    return GeneralResult(
        mean_interval([UNKNOWN if quality is None else quality for quality in found]),
        sum(quality is not None for quality in found) / len(found),
        sum((quality or 0) > 0 for quality in asked) / len(asked) if asked else None,
        sum(tokens for _, tokens, _ in made) / len(made),
        tuple(kept[:transcripts]),
    )
