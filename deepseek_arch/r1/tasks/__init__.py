"""Sources of problems: generators of this package, reasoning-gym's, and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..problems import ProblemSet
from .chains import Chains
from .general import Chat, preference_pairs
from .gym import Gym
from .table import Table

__all__ = ["TASKS", "Chains", "Chat", "Gym", "Table", "make_task", "preference_pairs"]

TASKS: dict[str, Callable[..., ProblemSet]] = {
    "chains": Chains,
    "chat": Chat,
    "gym": Gym,
    "jsonl": Table.from_jsonl,
    "dataset": Table.from_dataset,
}
"""Sources by name, as recipes write them."""


def make_task(name: str, options: Mapping[str, Any] | None = None) -> ProblemSet:
    """Returns the source `name` with `options` for its constructor.

    Raises:
        ValueError: an unknown source or option.
    """
    if name not in TASKS:
        raise ValueError(f"expected a task among {', '.join(TASKS)}, got {name!r}")
    try:
        return TASKS[name](**(options or {}))
    except TypeError as error:
        raise ValueError(f"expected options of the task {name!r}, got {sorted(options or {})}: {error}") from error
