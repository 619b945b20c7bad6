"""The calling convention of rewards: TRL's, on plain and on conversational prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Reward", "completion_text"]


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Returns the generated text of a completion: a string, or a conversation that ends with the assistant's message.

    Raises:
        ValueError: another type, or a message whose thoughts were taken out of the text by a response template: its
            form can no longer be judged.
    """
    if isinstance(completion, str):
        return completion
    if not completion or not isinstance(completion[-1], Mapping) or not isinstance(completion[-1].get("content"), str):
        raise ValueError(f"expected a completion of text, or messages that end with text, got {str(completion)[:80]!r}")
    message = completion[-1]
    for name in ("reasoning_content", "thinking", "reasoning"):
        if message.get(name):
            raise ValueError(
                f"expected completions as generated, got a message with {name!r} taken out: train with a tokenizer "
                "without a response template"
            )
    return message["content"]


class Reward:
    """A reward for TRL's trainers: `reward(completions=..., **columns)` gives one number or None for each completion.

    Subclasses define `score`, and `columns`: the names of the training set's columns that it reads.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.__name__ = name  # TRL logs by it

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        """Returns the reward of one completion, or None where it does not apply.

        Args:
            text: the completion.
            row: its problem's columns, and "completion_ids" where the trainer has them.
        """
        raise NotImplementedError

    def __call__(
        self,
        completions: Sequence[str | Sequence[Mapping[str, Any]]],
        prompts: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Returns the rewards of `completions`; the arguments are those of TRL's reward functions.

        Raises:
            ValueError: a column that this reward reads is missing.
        """
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise ValueError(f"expected columns {', '.join(self.columns)} for {self.__name__}, got no {missing[0]!r}")
        out = []
        for i, completion in enumerate(completions):
            row = {name: columns[name][i] for name in self.columns}
            if isinstance(row.get("data"), str):
                row["data"] = json.loads(row["data"])
            if completion_ids is not None:
                row["completion_ids"] = completion_ids[i]
            out.append(self.score(completion_text(completion), row))
        return out
