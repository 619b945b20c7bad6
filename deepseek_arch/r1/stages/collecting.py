"""Stages 2 and 4, the data: samples of a policy, the right and readable ones kept, refined or mixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..evaluation import mean_interval
from ..sampling import (
    CollectSettings,
    Filters,
    balance_languages,
    collect,
    decontaminate,
    general_rows,
    mix,
    write_rows,
)
from ..tasks import Chat
from .arguments import CommonArguments, checked, template_of
from .context import DATA, StageContext
from .policy import Policy
from .training import Stopwatch, save_stage

__all__ = ["CollectArguments", "collect_data"]


@dataclass
class CollectArguments(CommonArguments):
    """Fields of this stage; see `CommonArguments` for the others. `template` is that of the policy.

    Attributes:
        start_from: the stage that is sampled from.
        target: template of the rows.
        collect: fields of `CollectSettings`.
        filters: fields of `Filters`.
        balance: whether as many rows of each language are kept.
        max_rows: reasoning rows to keep, or None for all.
        general_ratio: reasoning rows for each row of general data; 0 for none of these. 3 in R1's second fine-tuning.
        general_quality: least quality of the general data, see `Chat.responses`.
        general_best: share of the best responses in it, None for each of those known alike.
        decontaminate: words of the sequences that questions may not share with the evaluation, 0 for no check.
    """

    start_from: str = ""
    target: str = "r1-marks"
    collect: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    balance: bool = False
    max_rows: int | None = None
    general_ratio: float = 0.0
    general_quality: float = 0.0
    general_best: float | None = None
    decontaminate: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start_from:
            raise ValueError("expected start_from in a stage that collects, got none")
        template_of(self.target)
        self.chosen = checked(Filters, self.filters, "filters")
        checked(CollectSettings, self.collect, "collect")
        if self.general_ratio < 0 or self.decontaminate < 0:
            raise ValueError(
                f"expected general_ratio and decontaminate >= 0, got {self.general_ratio}, {self.decontaminate}"
            )
        if self.general_best is not None and not 0 <= self.general_best <= 1:
            raise ValueError(f"expected general_best in [0, 1] or none, got {self.general_best}")

    @property
    def inputs(self) -> list[str]:
        """Stages that this one reads."""
        return [self.start_from]


def collect_data(arguments: CollectArguments, trainer_arguments: Any, context: StageContext) -> None:
    """Samples, filters and mixes; writes the rows.

    Raises:
        ValueError: no sample was good enough.
    """
    watch = Stopwatch()
    policy = Policy.load(
        context.model_of(arguments.start_from), arguments.batch_size, arguments.device, arguments.dtype,
        arguments.pad_token,
    )  # fmt: skip
    settings = checked(CollectSettings, {"seed": context.seed + 31} | arguments.collect, "collect")
    task, target = arguments.problems(), template_of(arguments.target)
    found = collect(policy, task, arguments.form, target, settings, arguments.chosen)
    rows = found.rows
    metrics: dict[str, Any] = {"samples": found.counts}
    if arguments.decontaminate:
        tested = [
            problem.question for problem in task.draw(arguments.settings.problems, arguments.settings.seed, "test")
        ]
        kept = decontaminate(rows, tested, arguments.decontaminate)
        metrics["contaminated"] = len(rows) - len(kept)
        rows = kept
    rows = balance_languages(rows) if arguments.balance else rows
    rows = rows[: arguments.max_rows]
    if not rows:
        raise ValueError(f"expected at least one sample to keep, got none of {sum(found.counts.values())}: "
                         f"{metrics}")  # fmt: skip
    metrics["reasoning_rows"] = len(rows)
    if arguments.general_ratio:
        wanted = max(1, round(len(rows) / arguments.general_ratio))
        quality, best = arguments.general_quality, arguments.general_best
        general = general_rows(Chat(), wanted, context.seed, target, quality, best)
        rows = mix(rows, general, arguments.general_ratio, context.seed)
    metrics["rows"] = len(rows)
    metrics["languages"] = _shares([row.language for row in rows])
    metrics["words"] = mean_interval([float(len(row.completion.split())) for row in rows]).mean
    write_rows(rows, context.folder / DATA)
    shown = [{"question": row.question, "response": row.completion, "kind": row.kind} for row in rows[:20]]
    save_stage(context, metrics, [], shown, watch.seconds())


def _shares(values: list[str | None]) -> dict[str, float]:
    names = sorted({value or "any" for value in values})
    return {name: sum((value or "any") == name for value in values) / len(values) for name in names}
