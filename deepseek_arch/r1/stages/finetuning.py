"""Stages 2, 4 and 6: supervised fine-tuning on collected data. Distillation is nothing else, of another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import set_seed

from ..checks import check_tokenizer, require
from ..sampling import read_rows
from ..templates import TAGS
from ..trainer.config import base_model
from ..trainer.supervised import R1SFTConfig, R1SFTTrainer
from .arguments import CommonArguments
from .context import DATA, StageContext
from .policy import Policy, load_model, load_tokenizer
from .training import Curve, Stopwatch, curve_values, measure_policy, save_stage, train, trainer_values

__all__ = ["FinetuneArguments", "finetune", "lora_config"]


@dataclass
class FinetuneArguments(CommonArguments):
    """Fields of this stage; see `CommonArguments` for the others.

    Attributes:
        start_from: the stage whose model is trained: the base in the paper, for both fine-tunings.
        data_from: the stage whose rows are trained on, or a file of them.
        lora: fields of peft's `LoraConfig`, or None to train all weights. Adapters are merged at the end.
    """

    start_from: str = ""
    data_from: str = ""
    lora: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start_from or not self.data_from:
            raise ValueError(
                f"expected start_from and data_from in a fine-tuning, got {self.start_from!r}, {self.data_from!r}"
            )

    @property
    def inputs(self) -> list[str]:
        """Stages that this one reads."""
        return [self.start_from, self.data_from]


def lora_config(fields: Mapping[str, Any] | None) -> Any:
    """Returns peft's configuration of adapters, None for none.

    Raises:
        ImportError: peft is missing.
    """
    return None if fields is None else require("peft").LoraConfig(**{"task_type": "CAUSAL_LM", **fields})


def finetune(arguments: FinetuneArguments, trainer_arguments: Mapping[str, Any], context: StageContext) -> None:
    """Trains on the completions of rows, and writes the model and its measures.

    Args:
        trainer_arguments: fields of `R1SFTConfig`.
    """
    watch = Stopwatch()
    set_seed(context.seed)
    source = context.model_of(arguments.start_from)
    tokenizer = load_tokenizer(source, arguments.pad_token)
    check_tokenizer(tokenizer, TAGS)
    model = load_model(source, arguments.dtype)
    data = context.find(arguments.data_from)
    rows = read_rows(data / DATA if data.is_dir() else data)
    args = R1SFTConfig(**trainer_values({"completion_only_loss": True, **trainer_arguments}, context))
    policy = Policy(model, tokenizer, arguments.batch_size)
    trainer = R1SFTTrainer(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_list([_example(row, policy) for row in rows]),
        processing_class=tokenizer,
        callbacks=[Curve(arguments.evaluate_every, lambda: curve_values(policy, arguments))],
        peft_config=lora_config(arguments.lora),
    )
    log = train(trainer)
    finish(trainer, tokenizer, arguments, context, log, watch, {"rows": len(rows)})


def _example(row: Any, policy: Policy) -> dict[str, list[int]]:
    """Returns token ids: a template's marks are tokens already, and nothing may be added to them."""
    prompt = policy.encode(row.prompt)
    completion = [*policy.encode(row.completion), *policy.end_tokens[:1]]
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def finish(
    trainer: Any,
    tokenizer: Any,
    arguments: CommonArguments,
    context: StageContext,
    log: list[dict[str, Any]],
    watch: Stopwatch,
    more: Mapping[str, Any],
) -> None:
    """Writes a trained model with its measures; adapters are merged into it before."""
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model = base_model(model)
    vars(model).pop("forward", None)  # TRL's, bound to this object
    policy = Policy(model, tokenizer, arguments.batch_size)
    policy.save(context.model)
    values, texts = measure_policy(policy, arguments)
    values |= {"steps_trained": trainer.state.global_step, **more}
    save_stage(context, values, log, texts, watch.seconds())
