"""Skills that a base must have before reinforcement learning is worth its time.

Reinforcement selects among what a policy already samples. Where single steps are at chance, or whole step lists hardly
ever come up, it learns the form of responses and nothing else (TRAPS T13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .evaluation.reasoning import Sampler, sample_texts
from .problems import Problem, ProblemSet
from .rewards import Accuracy
from .rollouts import Sampling
from .templates import Template

__all__ = ["Gate", "GateError", "GateResult", "Predictor", "measure", "step_accuracy"]


class Predictor(Sampler, Protocol):
    """A policy whose next tokens can be asked for."""

    def predict(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Returns for each token of each row the most probable token after it."""
        ...


@dataclass(frozen=True)
class Gate:
    """Least values to begin with, None for what is not asked for.

    Attributes:
        steps: accuracy of single steps under a forced, right step list.
        full_lists: share of samples at temperature 1 whose thoughts hold all steps and whose answer is right. 0.03 is
            enough with a format reward of 0.2; with one of 1.0 the policy locks into short well-formed thoughts below
            about 0.1. Lists alone do not count: a base whose best guess was right in 98 % of single steps drew wrong
            ones in its own lists, and learned only their form.
        pass_at: share of problems with a right answer among `samples` of them.
        samples, problems, seed: of what is measured.
    """

    steps: float | None = 0.9
    full_lists: float | None = 0.03
    pass_at: float | None = 0.5
    samples: int = 16
    problems: int = 32
    seed: int = 555

    def __post_init__(self) -> None:
        for name in ("steps", "full_lists", "pass_at"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"expected {name} in [0, 1] or None, got {value}")
        if self.samples < 1 or self.problems < 1:
            raise ValueError(f"expected samples and problems >= 1, got {self.samples} and {self.problems}")


@dataclass(frozen=True)
class GateResult:
    """Measurements; None for what the task has no measure of."""

    steps: float | None
    full_lists: float | None
    pass_at: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as JSON can hold them."""
        return asdict(self)


class GateError(ValueError):
    """A policy that reinforcement learning would not improve."""


def measure(policy: Predictor, task: ProblemSet, template: Template, gate: Gate, max_new_tokens: int) -> GateResult:
    """Measures a policy on training problems, and refuses one below the gate.

    Raises:
        GateError: a value below the gate's; the message has all of them.
    """
    problems = task.draw(gate.problems, gate.seed)
    sampling = Sampling(max_new_tokens, 1.0, end_tokens=policy.end_tokens, pad_token=policy.pad_token, seed=gate.seed)
    made = sample_texts(policy, problems, template, gate.samples, sampling)
    judge = Accuracy(template, task)
    right = [
        [judge.judge(text, problem) == 1.0 for text, _, _ in rows] for problem, rows in zip(problems, made, strict=True)
    ]
    forced, whole = getattr(task, "forced_steps", None), getattr(task, "full_list", None)
    lists = [
        found and bool(whole(template.parse(text).thought or text, problem))
        for problem, rows, grades in zip(problems, made, right, strict=True)
        for (text, _, _), found in zip(rows, grades, strict=True)
    ] if whole else []  # fmt: skip
    result = GateResult(
        step_accuracy(policy, problems, template, forced) if forced else None,
        sum(lists) / len(lists) if lists else None,
        sum(map(any, right)) / len(right),
    )
    low = [
        f"{name} {found:.3f} < {least}"
        for name, least, found in (
            ("steps", gate.steps, result.steps),
            ("full_lists", gate.full_lists, result.full_lists),
            (f"pass@{gate.samples}", gate.pass_at, result.pass_at),
        )
        if least is not None and found is not None and found < least
    ]
    if low:
        raise GateError(
            f"expected a policy that reinforcement learning can improve, got {', '.join(low)}: train it longer before, "
            "or lower the gate in the stage's file"
        )
    return result


def step_accuracy(policy: Predictor, problems: Sequence[Problem], template: Template, forced: Any) -> float:
    """Returns the share of right single steps under a forced, right step list.

    Args:
        forced: problem -> opening, and (context, node) of each step, as `Chains.forced_steps`.
    """
    rows, places = [], []
    for problem in problems:
        opening, steps = forced(problem)
        prompt = template.prompt(problem.question)
        ids = policy.encode(prompt)
        ids = ids if template.prefilled else ids + policy.encode(opening)
        marks = []
        for context, node in steps:
            target = policy.encode(node)
            ids = ids + policy.encode(context) + target
            marks.append((len(ids) - len(target) - 1, target))
            ids = ids + policy.encode(" .")
        rows.append(ids)
        places.append(marks)
    right = []
    for predicted, marks in zip(policy.predict(rows), places, strict=True):
        right += [predicted[at : at + len(target)] == target for at, target in marks]
    return sum(right) / len(right)
