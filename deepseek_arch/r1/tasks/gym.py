"""reasoning-gym's generated tasks: `pip install reasoning-gym`.

Its own scores pay a little for any answer that contains the right one. Here an answer is right or wrong.

Some of them evaluate an answer as Python (countdown hands it to sympy's `parse_expr`). They do it in a process of its
own, which is limited in time and memory and writes no files, and answers with names that could do harm are wrong before
they are scored. That is no wall against a determined attacker: run the trainer of a strong model in a container.
"""

from __future__ import annotations

import importlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..answer_process import AnswerProcess
from ..problems import Problem, check_split

__all__ = ["Gym"]

_TEST_SHARE = 1 / 8
_LONGEST = 20_000  # characters: grids are long
_HARMFUL = re.compile(
    r"__[a-z]|\*\*[^+/-]*\*\*|\blambda\b|\b(?:chr|compile|delattr|eval|exec|getattr|globals|input|breakpoint|lambdify|"
    r"locals|open|parse_expr|setattr|sympify|vars)\s*\("
)

_JUDGE = """
import functools
import reasoning_gym

@functools.cache
def scorer(dataset, options):
    return reasoning_gym.create_dataset(dataset, **(json.loads(options) | {"seed": 0, "size": 1})).score_answer

def judge(dataset, options, answer, entry):
    return scorer(dataset, options)(answer, entry) == 1.0
"""
_process = AnswerProcess("reasoning-gym", _JUDGE, seconds=10.0)


@dataclass
class Gym:
    """Problems of one of reasoning-gym's data sets.

    Attributes:
        dataset: its name there.
        options: arguments of its generator.
        language: of the questions.

    Raises:
        ImportError: reasoning-gym is missing.
    """

    dataset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    language: str = "en"
    name: str = field(default="gym", init=False)

    def __post_init__(self) -> None:
        self._create({"seed": 0, "size": 1})

    def _create(self, options: Mapping[str, Any]) -> Any:
        return create_dataset(self.dataset, {**self.options, **options})

    def draw(self, count: int, seed: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems. A hash of its question puts a problem in one of the splits.

        Raises:
            ValueError: the generator repeats itself too soon to give that many.
        """
        check_split(split)
        size = 64 + 32 * count
        entries = self._create({"seed": seed, "size": size})
        out: list[Problem] = []
        for i in range(size):
            if len(out) == count:
                break
            entry = entries[i]
            kept = zlib.crc32(entry["question"].encode()) / 2**32 < _TEST_SHARE
            if kept == (split == "test"):
                out.append(self._problem(entry))
        if len(out) < count:
            raise ValueError(f"expected {count} problems of {self.dataset!r} for the {split} split, got {len(out)}")
        return out

    def _problem(self, entry: Mapping[str, Any]) -> Problem:
        answer = entry["answer"]
        data = {"entry": json.loads(json.dumps(entry, default=str))}
        return Problem(
            entry["question"], "" if answer is None else str(answer), self.language, "reasoning", "gym", data
        )

    def grade(self, answer: str, problem: Problem) -> float | None:
        """Returns 1.0 where reasoning-gym's own score is full, which it must be in ten seconds.

        Raises:
            RuntimeError: reasoning-gym does not start in a process of its own.
        """
        if len(answer) > _LONGEST or _HARMFUL.search(answer):
            return 0.0
        options = json.dumps(dict(self.options), sort_keys=True)
        return float(_process.judge(self.dataset, options, answer.strip(), problem.data["entry"]))


def create_dataset(name: str, options: Mapping[str, Any]) -> Any:
    """Returns reasoning-gym's data set `name`.

    Raises:
        ImportError: it is not installed.
        ValueError: there is no such data set.
    """
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ImportError("expected reasoning-gym for this task, got none: pip install reasoning-gym") from error
    try:
        return gym.create_dataset(name, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"expected a data set of reasoning-gym and its options, got {name!r}: {error}") from error
