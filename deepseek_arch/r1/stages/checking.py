"""Checks of a stage's values before any stage of its recipe is trained: what its trainer, rewards or model refuse."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import transformers

from ...config.deepseek_config import DeepseekConfig
from ..rewards import LLMJudge, ModelReward
from .arguments import CommonArguments
from .collecting import CollectArguments
from .context import StageContext
from .finetuning import lora_config
from .judging import JudgeArguments
from .pretraining import PretrainArguments
from .registry import parse_stage
from .reinforcing import ReinforceArguments, rule_reward, training_shape
from .training import trainer_values

__all__ = ["check_stage"]


def check_stage(name: str, values: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Raises ValueError for values that the stage would refuse when its turn comes.

    Data sets of the Hub are not loaded for that, and no server is asked. What depends on an earlier stage's model is
    checked when it is there.

    Args:
        values: as a stage's file has them.
        folder: of its results; nothing is written there.

    Raises:
        ImportError: an extra package that the stage needs is missing.
        OSError: its task's file cannot be read.
    """
    kind, arguments, trainers = parse_stage(name, values)
    context = StageContext(name, folder, Path, seed)
    try:
        args: Any = _trainer(kind.trainer, trainers, context) if kind.trainer else None
        _check_task(arguments)
        if isinstance(arguments, PretrainArguments):
            _check_model(arguments)
            for phase in arguments.curriculum:
                _trainer(kind.trainer, {**trainers, **phase.trainer}, context)
        if isinstance(arguments, ReinforceArguments):
            training_shape(cast(Any, args))
            _check_rewards(arguments, args)
        lora_config(getattr(arguments, "lora", None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a stage {name!r} that can be run: {error}") from error


def _trainer(cls: Any, values: Mapping[str, Any], context: StageContext) -> Any:
    """Returns the trainer's arguments."""
    for each in dataclasses.fields(cls):
        given = values.get(each.name)
        if isinstance(each.default, int | float) and not isinstance(each.default, bool) and isinstance(given, str):
            raise ValueError(f"expected a number for {each.name}, got {given!r}")
    return cls(**trainer_values(values, context))


def _check_task(arguments: CommonArguments) -> None:
    """A task that is evaluated needs answers, and a collected one too."""
    if isinstance(arguments, JudgeArguments) or arguments.task["name"] == "dataset":
        return
    split = "train" if isinstance(arguments, CollectArguments) else "test"
    task = arguments.problems()
    if task.draw(1, arguments.settings.seed, split)[0].answer is None:
        raise ValueError(f"expected a task with answers, got {task.name!r} with problems that have none")


def _check_model(arguments: PretrainArguments) -> None:
    if arguments.architecture == "deepseek":
        DeepseekConfig(**{"vocab_size": arguments.vocab_size, **arguments.model})
        return
    cls = getattr(transformers, {"qwen2": "Qwen2Config", "llama": "LlamaConfig"}[arguments.architecture])
    known = cls()
    for key in arguments.model:
        # transformers' configs take any field; its attention reads a head_dim that a config need not have.
        if not hasattr(known, key) and key != "head_dim":
            raise ValueError(f"expected fields of {cls.__name__}, got {key!r}")
    cls(**arguments.model)


def _check_rewards(arguments: ReinforceArguments, args: Any) -> None:
    if not arguments.reward_funcs:
        raise ValueError("expected at least one reward, got none")
    if args.reward_weights is not None and len(args.reward_weights) != len(arguments.reward_funcs):
        raise ValueError(
            f"expected a weight for each of {len(arguments.reward_funcs)} rewards, got {len(args.reward_weights)}"
        )
    for name in arguments.reward_funcs:
        options = arguments.reward_options.get(name, {})
        given = arguments.judges.get(name)
        if given is None:
            rule_reward(name, options, arguments, None)
        elif "endpoint" in given:
            LLMJudge(arguments.form, name=name, **(given | options))
        else:
            known = inspect.signature(ModelReward).parameters
            for key in (*given, *options):
                if key != "stage" and key not in known:
                    raise ValueError(f"expected options of the reward {name!r}, got {key!r}")
