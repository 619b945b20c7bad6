"""Problems from tables: JSON Lines files, and data sets of Hugging Face's library."""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..problems import Problem, check_split
from ..rewards import GRADERS, grade
from ..templates import boxes

__all__ = ["Table"]

_GSM8K = re.compile(r"####\s*(.+?)\s*\Z")


@dataclass
class Table:
    """Rows of a table as problems.

    Attributes:
        rows: mappings, each with a question and an answer.
        question, answer: the names of their columns. An answer may be a whole solution, whose result stands behind
            "####" or in its last box.
        language: of the expected responses, or a column's name in "{column}".
        grader: the rule that compares answers, a key of `rewards.GRADERS`.
        test_share: share of the rows for the test split, chosen by a hash of the question.
        columns: further columns that the grader reads, as "choices".

    Raises:
        ValueError: no rows, a column that is missing, or a row without an answer.
    """

    rows: Sequence[Mapping[str, Any]]
    question: str = "problem"
    answer: str = "answer"
    language: str | None = "en"
    grader: str = "math"
    test_share: float = 0.1
    columns: Sequence[str] = ()
    name: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise ValueError(f"expected a grader among {', '.join(GRADERS)}, got {self.grader!r}")
        if not 0 <= self.test_share < 1:
            raise ValueError(f"expected test_share in [0, 1), got {self.test_share}")
        problems = [self._problem(i, row) for i, row in enumerate(self.rows)]
        if not problems:
            raise ValueError("expected a table with at least one row, got none")
        self._splits: dict[str, list[Problem]] = {"train": [], "test": []}
        for problem in problems:
            share = zlib.crc32(problem.question.encode()) / 2**32
            self._splits["test" if share < self.test_share else "train"].append(problem)

    @classmethod
    def from_jsonl(cls, path: str | Path, **options: Any) -> Table:
        """Reads a file of one JSON object a line.

        Raises:
            ValueError: a line that is none.
        """
        rows = []
        # Not splitlines: texts may hold other characters that end lines for it, as U+2028.
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"expected one JSON object a line, got {line[:60]!r} in line {number}") from error
        return cls(rows, **options)

    @classmethod
    def from_dataset(cls, path: str, split: str = "train", subset: str | None = None, **options: Any) -> Table:
        """Loads a data set with the library `datasets`, by its name on the Hub or from a folder.

        Raises:
            ImportError: the library is missing.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError('expected datasets, got none: pip install "deepseek-arch[r1]"') from error
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(path, subset, split=split)
        return cls(list(rows), **options)

    def _problem(self, number: int, row: Mapping[str, Any]) -> Problem:
        missing = [name for name in (self.question, self.answer, *self.columns) if name not in row]
        if missing:
            raise ValueError(f"expected column {missing[0]!r} in every row, got {', '.join(row)} in row {number}")
        language = self.language
        if language is not None and language.startswith("{"):
            language = row[language.strip("{}")]
        data = {name: row[name] for name in self.columns}
        answer = self._result(row[self.answer])
        if answer is None:
            raise ValueError(
                f"expected an answer in column {self.answer!r} of every row, got {str(row[self.answer])[-60:]!r} in "
                f"row {number}"
            )
        return Problem(str(row[self.question]), answer, language, "reasoning", self.grader, data)

    def _result(self, answer: Any) -> str | None:
        """Returns the result of a solution; tests of programs as JSON."""
        if self.grader == "code":
            return answer if isinstance(answer, str) else json.dumps(answer)
        if answer is None or not str(answer).strip():
            return None
        text = str(answer)
        marked = _GSM8K.search(text)
        if marked:
            return marked[1]
        found = boxes(text)
        return found[-1] if found else text.strip()

    def draw(self, count: int, seed: int, split: str = "train") -> list[Problem]:
        """Returns `count` rows in an order drawn with `seed`, starting anew after all were used.

        Raises:
            ValueError: the split is empty.
        """
        check_split(split)
        rows = self._splits[split]
        if not rows:
            raise ValueError(f"expected at least one row for the {split} split, got none of {len(self.rows)}")
        rng = random.Random(f"table {seed}")
        out: list[Problem] = []
        while len(out) < count:
            order = list(rows)
            rng.shuffle(order)
            out += order
        return out[:count]

    def grade(self, answer: str, problem: Problem) -> float | None:
        """Returns what the table's rule says."""
        return grade(answer, problem.answer, problem.grader, problem.data)
