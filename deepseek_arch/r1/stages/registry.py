"""The kinds of stages by name, and how one is run from the fields of its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl import RewardConfig

from ..trainer import R1Config, R1SFTConfig
from .arguments import CommonArguments, split_fields
from .collecting import CollectArguments, collect_data
from .context import StageContext
from .finetuning import FinetuneArguments, finetune
from .judging import JudgeArguments, train_judge
from .pretraining import PretrainArguments, PretrainConfig, pretrain
from .reinforcing import ReinforceArguments, reinforce
from .training import bars

__all__ = ["STAGES", "StageKind", "parse_stage", "run_stage"]


@dataclass(frozen=True)
class StageKind:
    """A kind of stage.

    Attributes:
        arguments: dataclass of its own fields.
        trainer: dataclass of its trainer's fields, or None.
        run: the function.
    """

    arguments: type[Any]
    trainer: type[Any] | None
    run: Callable[[Any, Mapping[str, Any], StageContext], None]


STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(PretrainArguments, PretrainConfig, pretrain),
    "reinforce": StageKind(ReinforceArguments, R1Config, reinforce),
    "collect": StageKind(CollectArguments, None, collect_data),
    "finetune": StageKind(FinetuneArguments, R1SFTConfig, finetune),
    "judge": StageKind(JudgeArguments, RewardConfig, train_judge),
}


def parse_stage(name: str, values: Mapping[str, Any]) -> tuple[StageKind, CommonArguments, dict[str, Any]]:
    """Returns the kind of a stage, its own arguments, and the fields of its trainer.

    Args:
        values: as a stage's file has them: `kind`, and fields.

    Raises:
        ValueError: no kind, a field that nobody knows, or a value that is out of range.
    """
    fields = {key: value for key, value in values.items() if key != "kind"}
    if values.get("kind") not in STAGES:
        raise ValueError(f"expected a kind among {', '.join(STAGES)} in stage {name!r}, got {values.get('kind')!r}")
    kind = STAGES[values["kind"]]
    own, trainers = split_fields(fields, kind.arguments, kind.trainer, f"stage {name!r}")
    try:
        return kind, kind.arguments(**own), trainers
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a stage {name!r} that can be run: {error}") from error


def run_stage(values: Mapping[str, Any], context: StageContext) -> None:
    """Runs a stage from the fields of its file.

    Raises:
        ValueError: see `parse_stage`; and what the stage refuses.
    """
    kind, arguments, trainers = parse_stage(context.name, values)
    context.folder.mkdir(parents=True, exist_ok=True)
    with bars(context.progress):
        kind.run(arguments, trainers, context)
