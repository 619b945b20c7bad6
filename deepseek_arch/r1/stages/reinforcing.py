"""Stages 1, 3 and 5: reinforcement learning with GRPO, from any model, with any of the rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import AutoModelForSequenceClassification, set_seed

from ..gate import Gate, measure
from ..problems import Problem
from ..rewards import Accuracy, Format, Language, LLMJudge, ModelReward, Overlong, Repetition
from ..templates import TAGS
from ..trainer import R1Config, R1Trainer
from .arguments import CommonArguments, check_source, checked, make_source
from .context import StageContext
from .finetuning import finish, lora_config
from .policy import Policy, load_model, load_tokenizer
from .training import Curve, Stopwatch, curve_values, train, trainer_values

__all__ = ["REWARDS", "ReinforceArguments", "Source", "rollout_steps"]

REWARDS = ("accuracy", "format", "language", "repetition", "overlong")


@dataclass(frozen=True)
class Source:
    """Prompts of a mixture.

    Attributes:
        task: as `CommonArguments.task`.
        share: of the prompts, in relation to the other sources'.
        active_from: share of the training before they come: general prompts came in the last 400 of R1's 1,700 steps.
    """

    task: Mapping[str, Any]
    share: float = 1.0
    active_from: float = 0.0

    def __post_init__(self) -> None:
        check_source(self.task)
        if not self.share > 0 or not 0 <= self.active_from <= 1:
            raise ValueError(f"expected share > 0 and active_from in [0, 1], got {self.share} and {self.active_from}")


@dataclass
class ReinforceArguments(CommonArguments):
    """Fields of this stage; see `CommonArguments` for the others. `task` is what is evaluated.

    Attributes:
        start_from: the stage whose model is trained.
        prompts: sources of the prompts, fields of `Source` each; default: the task alone.
        reward_funcs: names among `REWARDS`, and names of `judges`. `reward_weights` is TRL's.
        reward_options: arguments of the rewards by their name.
        judges: reward models: `{helpful: {stage: helpful, reads: summary, active_from: 0.75}}`, the arguments of
            `ModelReward` and the stage that trained it; or `{critic: {endpoint: "http://host/v1", model: name}}`, those
            of `LLMJudge`.
        gate: fields of `Gate`, or None to begin with any model.
        lora: fields of peft's `LoraConfig`, or None to train all weights. Adapters are merged at the end.
    """

    start_from: str = ""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: dict[str, Any] | None = field(default_factory=dict)
    lora: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start_from:
            raise ValueError("expected start_from in a reinforcement stage, got none")
        known = (*REWARDS, *self.judges)
        for name in (*self.reward_funcs, *self.reward_options):
            if name not in known:
                raise ValueError(f"expected rewards among {', '.join(known)}, got {name!r}")
        for name, options in self.judges.items():
            if ("stage" in options) == ("endpoint" in options):
                raise ValueError(
                    f"expected the stage or the endpoint of the reward model {name!r}, got {sorted(options)}"
                )
        self.entry = None if self.gate is None else checked(Gate, self.gate, "gate")
        given = self.prompts or [{"task": self.task}]
        self.sources = [checked(Source, source, f"prompts {i}") for i, source in enumerate(given)]
        if not any(source.active_from == 0 for source in self.sources):
            raise ValueError("expected prompts that are there from the start, got none with active_from 0")

    @property
    def inputs(self) -> list[str]:
        """Stages that this one reads."""
        return [self.start_from, *(options["stage"] for options in self.judges.values() if "stage" in options)]


def rollout_steps(args: R1Config) -> int:
    """Returns the optimizer steps from one rollout to the next."""
    assert args.steps_per_generation is not None
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


def reinforce(arguments: ReinforceArguments, trainer_arguments: Mapping[str, Any], context: StageContext) -> None:
    """Trains with GRPO, and writes the model and its measures.

    Args:
        trainer_arguments: fields of `R1Config`. Checkpoints fall where a rollout ends (TRAPS T14): `save_steps` is
            raised to a multiple of the steps between rollouts.

    Raises:
        GateError: a model that reinforcement learning would not improve.
    """
    watch = Stopwatch()
    set_seed(context.seed)
    source = context.model_of(arguments.start_from)
    tokenizer = load_tokenizer(source, arguments.pad_token)
    model = load_model(source, arguments.dtype)
    args = R1Config(**trainer_values({"shuffle_dataset": False, **trainer_arguments}, context))
    training_shape(args)
    every = rollout_steps(args)
    args.save_steps = int(-(-args.save_steps // every) * every)
    policy = Policy(model, tokenizer, arguments.batch_size)
    found = {}
    if arguments.entry is not None:
        limit = int(args.max_completion_length or arguments.settings.max_new_tokens)
        found["gate"] = measure(policy, arguments.problems(), arguments.form, arguments.entry, limit).to_dict()
    set_seed(context.seed)
    functions = rewards(arguments, context)
    preferences = [one for one in functions if isinstance(one, ModelReward) and not one.bounded]
    trainer = R1Trainer(
        model,
        functions,
        args,
        tags=TAGS[:2] if arguments.form.style == "boxed" else TAGS,
        train_dataset=datasets.Dataset.from_list(training_rows(arguments, args, context.seed)),
        processing_class=tokenizer,
        callbacks=[Curve(arguments.evaluate_every, lambda: curve_values(policy, arguments, *preferences[:1]))],
        peft_config=lora_config(arguments.lora),
    )
    log = train(trainer)
    finish(trainer, tokenizer, arguments, context, log, watch, found)


def rewards(arguments: ReinforceArguments, context: StageContext) -> list[Any]:
    """Returns the reward functions in the order of their names.

    Raises:
        ValueError: an option that a reward does not have, or a judge's server that refuses requests.
        ConnectionError: a judge's server that does not answer.
    """
    out: list[Any] = []
    for name in arguments.reward_funcs:
        options = dict(arguments.reward_options.get(name, {}))
        try:
            if "endpoint" in arguments.judges.get(name, {}):
                asked = LLMJudge(arguments.form, name=name, **(arguments.judges[name] | options))
                asked.check()
                out.append(asked)
            elif name in arguments.judges:
                given = {key: value for key, value in arguments.judges[name].items() if key != "stage"}
                folder = context.model_of(arguments.judges[name]["stage"])
                judge = load_model(folder, factory=AutoModelForSequenceClassification).eval()
                out.append(ModelReward(judge, load_tokenizer(folder), arguments.form, name=name, **(given | options)))
            else:
                # reasoning-gym's problems are graded by its own code, all others by the rule that they name.
                own = arguments.problems() if arguments.task["name"] == "gym" and name == "accuracy" else None
                out.append(rule_reward(name, options, arguments, own))
        except TypeError as error:
            raise ValueError(f"expected options of the reward {name!r}, got {sorted(options)}: {error}") from error
    return out


def rule_reward(name: str, options: Mapping[str, Any], arguments: ReinforceArguments, problems: Any) -> Any:
    """Returns one of `REWARDS`.

    Args:
        problems: a source that grades by rules of its own, or None.

    Raises:
        TypeError: an option that it does not have.
        ValueError: one that is out of range.
    """
    if name == "overlong":
        return Overlong(**options)
    if name == "accuracy":
        return Accuracy(arguments.form, problems, **options)
    kinds: dict[str, Any] = {"format": Format, "language": Language, "repetition": Repetition}
    return kinds[name](arguments.form, **options)


def training_shape(args: R1Config) -> tuple[int, int]:
    """Returns the rollouts of a training, and the prompts of each.

    Raises:
        ValueError: no steps, or a rollout that is no multiple of a group.
    """
    if args.max_steps < 1:
        raise ValueError(f"expected max_steps >= 1, got {args.max_steps}")
    assert args.steps_per_generation is not None
    at_once = args.per_device_train_batch_size * args.world_size * args.steps_per_generation
    group = args.num_generations or 1
    if at_once % group:
        raise ValueError(f"expected rollouts that are multiples of {group} generations, got {at_once} completions")
    return -(-args.max_steps // rollout_steps(args)), at_once // group


def training_rows(arguments: ReinforceArguments, args: R1Config, seed: int) -> list[dict[str, Any]]:
    """Returns the prompts of all steps in order: those of sources that come later stand behind."""
    rollouts, each = training_shape(args)
    prompts = rollouts * each
    drawn = [iter(make_source(source.task).draw(prompts, seed + 7)) for source in arguments.sources]
    owed, rows = [0.0] * len(drawn), []
    for i in range(prompts):
        # Each place goes to the source that is furthest behind its share: the mixture is even throughout.
        active = [j for j, source in enumerate(arguments.sources) if i >= source.active_from * prompts]
        total = sum(arguments.sources[j].share for j in active)
        for j in active:
            owed[j] += arguments.sources[j].share / total
        chosen = max(active, key=owed.__getitem__)
        owed[chosen] -= 1
        rows.append(_row(next(drawn[chosen]), arguments))
    return rows


def _row(problem: Problem, arguments: ReinforceArguments) -> dict[str, Any]:
    return {"prompt": arguments.form.prompt(problem.question), **problem.columns()}
