"""Arguments of all stages: their own fields, and the trainer's under the names that TRL gives them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..evaluation import EvaluationSettings
from ..problems import ProblemSet
from ..tasks import TASKS, make_task
from ..templates import TEMPLATES, Template

__all__ = ["CommonArguments", "checked", "split_fields", "template_of"]

T = TypeVar("T")


def checked(cls: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """Returns `cls(**values)`.

    Raises:
        ValueError: a field that `cls` does not have, or what its constructor refuses.
    """
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    _check_names(values or {}, names, where)
    try:
        return cls(**(values or {}))
    except TypeError as error:
        raise ValueError(f"expected fields of {where}, got {sorted(values or {})}: {error}") from error


def _check_names(given: Mapping[str, Any] | Sequence[str], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected known fields in {where}, got {name!r}{hint}")


def split_fields(values: Mapping[str, Any], ours: type, theirs: type | None, where: str) -> tuple[dict, dict]:
    """Returns the values of this package's fields, and of the trainer's.

    Raises:
        ValueError: a field of neither.
    """
    own = [f.name for f in dataclasses.fields(ours) if f.init]
    trainers = [f.name for f in dataclasses.fields(theirs) if f.init] if theirs else []
    _check_names(values, own + [name for name in trainers if name != "output_dir"], where)
    return {k: v for k, v in values.items() if k in own}, {k: v for k, v in values.items() if k not in own}


def template_of(name: str) -> Template:
    """Returns the template `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"expected a template among {', '.join(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


@dataclass
class CommonArguments:
    """Fields of every stage.

    Attributes:
        task: the problems: `{name: chains, nodes: 6, low: 3, high: 5}`, a name of `tasks.TASKS` with its options.
        template: the form of the responses, a name of `templates.TEMPLATES`.
        evaluation: fields of `EvaluationSettings`; `max_new_tokens` is the longest response of the stage.
        evaluate_every: steps between evaluations during training, 0 for none.
        evaluate_general: whether everyday prompts are evaluated too.
        batch_size: rows that are sampled at once when evaluating and collecting.
        dtype: of the weights, as transformers names it.
        device: that stages which do not train run on; trainers choose theirs.
        pad_token: a token of the tokenizer to pad with, where it pads with its end token (TRAPS T9), or None.
    """

    task: dict[str, Any] = field(default_factory=lambda: {"name": "chains"})
    template: str = "r1-marks"
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluate_every: int = 0
    evaluate_general: bool = False
    batch_size: int = 256
    dtype: str = "auto"
    device: str = "cpu"
    pad_token: str | None = None

    def __post_init__(self) -> None:
        self.form = template_of(self.template)
        self.settings = checked(EvaluationSettings, self.evaluation, "evaluation")
        if self.evaluate_every < 0 or self.batch_size < 1:
            raise ValueError(
                f"expected evaluate_every >= 0 and batch_size >= 1, got {self.evaluate_every} and {self.batch_size}"
            )
        check_source(self.task)

    def problems(self) -> ProblemSet:
        """Returns the source of the problems."""
        return make_source(self.task)


def check_source(task: Mapping[str, Any]) -> None:
    """Raises ValueError for a task without a name, an unknown one, and options that generators do not have.

    Tables are not read for that, nor libraries imported.
    """
    if not isinstance(task, Mapping) or "name" not in task:
        raise ValueError(f"expected a task with a name, got {task!r}")
    if task["name"] not in TASKS or task["name"] in ("chains", "chat"):
        make_source(task)


def make_source(task: Mapping[str, Any]) -> ProblemSet:
    """Returns the source that `{name: ..., options}` describes.

    Raises:
        ValueError: an unknown source or option.
    """
    return make_task(task["name"], {name: value for name, value in task.items() if name != "name"})
