"""Evaluation on problems with answers, as R1 was evaluated: k samples a problem, never greedy (arXiv 2501.12948)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..language import consistency
from ..problems import Problem, ProblemSet
from ..rewards import Accuracy
from ..rollouts import Rollout, Sampling
from ..templates import Template
from .measures import Interval, mean_interval, reflections, vote

__all__ = ["Evaluation", "EvaluationSettings", "Sampler", "Transcript", "evaluate", "sample_texts"]


class Sampler(Protocol):
    """A policy, as evaluation sees it."""

    end_tokens: tuple[int, ...]
    pad_token: int

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Returns the token ids of a prompt: text, or a conversation that the chat template renders."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of a completion, tags included, its end token not."""
        ...

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, record_routing: bool = False) -> Rollout:
        """Returns a completion for each prompt, in their order."""
        ...


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation; the defaults are the paper's.

    Attributes:
        problems: drawn from the test split.
        samples: of each problem. Their mean is pass@1, their vote cons@k.
        temperature, top_p: of the sampling.
        max_new_tokens: of a completion.
        seed: of the problems and of the samples.
    """

    problems: int = 400
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32_768
    seed: int = 999

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(
                f"expected a temperature above 0, got {self.temperature}: greedy decoding of reasoning models repeats "
                "itself and differs between checkpoints (arXiv 2501.12948, section 4)"
            )


@dataclass(frozen=True)
class Transcript:
    """One response, to be read.

    Attributes:
        question, response: texts.
        expected, answer: the reference, and what was read from the response.
        right, formatted: of the response.
        tokens: of the response.
    """

    question: str
    response: str
    expected: str | None
    answer: str | None
    right: float | None
    formatted: bool
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Measurements.

    Attributes:
        pass_at_1: share of right samples, mean over problems.
        any_right: share of problems with at least one right sample (pass@k).
        voted: share of problems whose vote is right (cons@k).
        strict: share of samples that are right and well-formed.
        formatted: share of well-formed samples.
        consistency: share of the thoughts' words in the problem's language, as the paper counts them, or of all words
            of a response without thoughts; mean over samples with words, None without any.
        summary_consistency: the same of what stands behind the thoughts.
        tokens: of a sample, mean.
        reflections: words of reflection in a sample, mean.
        ended: share of samples that ended by themselves.
        samples: of each problem.
        transcripts: the first sample of the first problems.
    """

    pass_at_1: Interval
    any_right: float
    voted: float
    strict: float
    formatted: float
    consistency: float | None
    summary_consistency: float | None
    tokens: float
    reflections: float
    ended: float
    samples: int
    transcripts: tuple[Transcript, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the transcripts as JSON can hold it."""
        out = asdict(self)
        del out["transcripts"]
        return out


def sample_texts(
    policy: Sampler, problems: Sequence[Problem], template: Template, samples: int, sampling: Sampling
) -> list[list[tuple[str, int, bool]]]:
    """Returns for each problem its samples: text, number of tokens, and whether it ended by itself."""
    prompts = [policy.encode(template.prompt(problem.question)) for problem in problems]
    rollout = policy.sample([prompt for prompt in prompts for _ in range(samples)], sampling)
    rows = [
        (policy.decode(ids), len(ids), ended) for ids, ended in zip(rollout.completions, rollout.ended, strict=True)
    ]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


def evaluate(
    policy: Sampler,
    task: ProblemSet,
    template: Template,
    settings: EvaluationSettings | None = None,
    transcripts: int = 20,
) -> Evaluation:
    """Samples responses to held-out problems and measures them.

    Args:
        task: a source whose problems have answers.
        template: the form of the responses.
        transcripts: how many to keep.

    Raises:
        ValueError: a problem without an answer, or a source without a test split.
    """
    settings = settings or EvaluationSettings()
    problems = task.draw(settings.problems, settings.seed, "test")
    if any(problem.answer is None for problem in problems):
        raise ValueError(f"expected a task with answers, got {task.name!r} with problems that have none")
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, None, settings.top_p, policy.end_tokens, policy.pad_token,
        settings.seed,
    )  # fmt: skip
    made = sample_texts(policy, problems, template, settings.samples, sampling)
    judge = Accuracy(template, task)
    right = [[judge.judge(text, problem) or 0.0 for text, _, _ in rows] for problem, rows in
             zip(problems, made, strict=True)]  # fmt: skip
    flat = [(problem, *row) for problem, rows in zip(problems, made, strict=True) for row in rows]
    parsed = [template.parse(text) for _, text, _, _ in flat]
    votes = [vote([template.parse(text).answer for text, _, _ in rows]) for rows in made]
    voted = [0.0 if answer is None else task.grade(answer, problem) or 0.0 for answer, problem in
             zip(votes, problems, strict=True)]  # fmt: skip
    thoughts = [response.thought or response.prose for response in parsed]
    summaries = [response.summary or "" if response.thought else "" for response in parsed]
    languages = [problem.language for problem, *_ in flat]
    scores = [score for row in right for score in row]
    kept = [i * settings.samples for i in range(min(transcripts, len(problems)))]
    return Evaluation(
        mean_interval([_mean(row) for row in right]),
        _mean([float(max(row) >= 1) for row in right]),
        _mean(voted),
        _mean([score * (not response.faults) for score, response in zip(scores, parsed, strict=True)]),
        _mean([float(not response.faults) for response in parsed]),
        _mean_consistency(thoughts, languages),
        _mean_consistency(summaries, languages),
        _mean([float(count) for _, _, count, _ in flat]),
        _mean([float(reflections(text)) for _, text, _, _ in flat]),
        _mean([float(ended) for *_, ended in flat]),
        settings.samples,
        tuple(
            Transcript(flat[i][0].question, flat[i][1], flat[i][0].answer, parsed[i].answer, scores[i],
                       not parsed[i].faults, flat[i][2]) for i in kept
        ),
    )  # fmt: skip


def _mean_consistency(texts: Sequence[str], languages: Sequence[str | None]) -> float | None:
    found = [
        consistency(text, language) for text, language in zip(texts, languages, strict=True) if language is not None
    ]
    shares = [share for share in found if share is not None]
    return _mean(shares) if shares else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
