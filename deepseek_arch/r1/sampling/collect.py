"""Rejection sampling: many responses to each problem, the right and readable ones kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from ..evaluation.reasoning import Sampler, sample_texts
from ..problems import Problem, ProblemSet
from ..rewards import Accuracy
from ..rollouts import Sampling
from ..templates import Parsed, Template
from .filters import Filters
from .rows import Row

__all__ = ["CollectSettings", "Collected", "collect"]


@dataclass(frozen=True)
class CollectSettings:
    """Settings by which samples are drawn and chosen.

    Attributes:
        problems: drawn from the training split.
        samples: of each.
        keep: of each, at most; the first ones.
        temperature, max_new_tokens: of the sampling.
        seed: of problems and samples.
        written: problems whose responses the task writes itself, in addition: people wrote a part of the paper's data.
        refine: whether the task's own refinement rewrites thoughts and summaries, languages included: a sample is then
            not refused for its language before.
        summarize: whether the task writes the summaries alone, and thoughts stay as they are.
    """

    problems: int = 1000
    samples: int = 4
    keep: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 32_768
    seed: int = 31
    written: int = 0
    refine: bool = False
    summarize: bool = False

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "keep", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.written < 0:
            raise ValueError(f"expected written >= 0, got {self.written}")


@dataclass
class Collected:
    """Rows, and what became of all samples.

    Attributes:
        rows: to train on.
        counts: samples by what they were refused for; "kept" and "spare" (right ones beyond `keep`) among them.
    """

    rows: list[Row]
    counts: dict[str, int] = field(default_factory=dict)


def collect(
    policy: Sampler, task: ProblemSet, template: Template, target: Template, settings: CollectSettings, filters: Filters
) -> Collected:
    """Samples responses and keeps the right ones that pass the filters, in the form of another stage.

    Args:
        template: the form that the policy was trained in.
        target: the form of the rows: prompts, and completions with one pair of thinking tags.

    Raises:
        ValueError: refinement by a task that has none, or a target without boxes.
    """
    if target.style != "boxed":
        raise ValueError(f"expected a target template with boxed answers, got style {target.style!r}")
    refine = getattr(task, "refine", None)
    if (settings.refine or settings.summarize) and refine is None:
        raise ValueError(f"expected a task that can refine thoughts, got {task.name!r}, which cannot")
    problems = task.draw(settings.problems, settings.seed)
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, end_tokens=policy.end_tokens, pad_token=policy.pad_token,
        seed=settings.seed,
    )  # fmt: skip
    made = sample_texts(policy, problems, template, settings.samples, sampling)
    judge, counts, rows = Accuracy(template, task), Counter[str](), []
    if settings.refine:
        filters = replace(filters, consistency=None)
    for problem, samples in zip(problems, made, strict=True):
        kept = 0
        for text, tokens, ended in samples:
            parsed = template.parse(text)
            reason = _refusal(judge, filters, parsed, problem, (text, tokens, ended))
            reason = reason or ("spare" if kept >= settings.keep else None)
            counts[reason or "kept"] += 1
            if reason is None:
                kept += 1
                thought, summary = _parts(parsed, problem, template, refine, settings)
                rows.append(_row(problem, target, thought, summary))
    rows += _written(task, target, settings)
    return Collected(rows, dict(counts))


def _written(task: Any, target: Template, settings: CollectSettings) -> list[Row]:
    """Returns rows that the task solves itself."""
    if not settings.written:
        return []
    if not hasattr(task, "solve") or not hasattr(task, "refine"):
        raise ValueError(f"expected a task that can write responses, got {task.name!r}, which cannot")
    rows = []
    for problem in task.draw(settings.written, settings.seed + 1):
        thought, answer = task.solve(problem)
        rows.append(_row(problem, target, *task.refine(thought, answer, problem)))
    return rows


def _refusal(
    judge: Accuracy, filters: Filters, parsed: Parsed, problem: Problem, sample: tuple[str, int, bool]
) -> str | None:
    text, tokens, ended = sample
    return "wrong" if judge.judge(text, problem) != 1.0 else filters.reason(parsed, problem, tokens, ended)


def _parts(
    parsed: Parsed, problem: Problem, template: Template, refine: Any, settings: CollectSettings
) -> tuple[str, str]:
    """Returns thoughts and summary of a response that has both and an answer."""
    thought, answer = (parsed.thought or "").strip(), parsed.answer or ""
    if settings.refine or settings.summarize:
        refined, summary = refine(thought, answer.strip(), problem)
        return (refined if settings.refine else thought), summary
    if template.style == "boxed":
        return thought, (parsed.summary or "").strip()
    # With the spaces around it: without them an answer is other tokens than the policy's.
    return thought, f"\\boxed{{{answer}}}"


def _row(problem: Problem, target: Template, thought: str, summary: str) -> Row:
    start = "" if target.prefilled else "<think> "
    completion = f"{start}{thought} </think> {summary}"
    return Row(problem.question, target.prompt(problem.question), completion, problem.language, problem.kind)
