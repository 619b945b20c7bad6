"""Stage 0, the base: a small model pretrained on generated text, by a curriculum (V3-Base's part in the paper)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ... import hf
from ...config.deepseek_config import DeepseekConfig
from ..gate import step_accuracy
from ..tasks import Chains
from ..tasks.corpus import Corpus
from ..templates import TEMPLATES
from .arguments import CommonArguments, checked
from .context import StageContext
from .policy import Policy, load_model, load_tokenizer
from .tokenizer import train_tokenizer
from .training import Stopwatch, measure_policy, save_stage, train, trainer_values

__all__ = ["Phase", "PretrainArguments", "PretrainConfig", "pretrain"]

ARCHITECTURES = ("deepseek", "qwen2", "llama")


@dataclass
class PretrainConfig(TrainingArguments):
    """transformers' `TrainingArguments`, every field of it, and what this model's training needs beside them."""

    balance_rate: float = field(default=0.0, metadata={"help": "Step of the routers' biases against the load."})
    mtp_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the prediction layers' loss."})


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum.

    Attributes:
        nodes, low, high: of the problems, see `Chains`.
        text: see `Corpus`.
        max_steps: of the optimizer.
        until_steps: accuracy of single steps under a forced step list at which the phase ends earlier, or None. Seeds
            differ threefold in the time to it, so that a fixed time is no criterion.
        check_every: steps between looks at that.
        trainer: further fields of the trainer for this phase.
    """

    nodes: int = 6
    low: int = 3
    high: int = 5
    text: str = "mixture"
    max_steps: int = 100
    until_steps: float | None = None
    check_every: int = 50
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.check_every < 1:
            raise ValueError(f"expected max_steps and check_every >= 1, got {self.max_steps}, {self.check_every}")
        Corpus(Chains(self.nodes, self.low, self.high), self.text)  # says what is wrong with these


@dataclass
class PretrainArguments(CommonArguments):
    """Fields of this stage; see `CommonArguments` for the others.

    Attributes:
        architecture: "deepseek", or a dense one of transformers: "qwen2", "llama".
        model: fields of its config; vocabulary and special tokens follow from the tokenizer.
        tokenizer_from: a stage whose tokenizer is used, None to train one.
        vocab_size: of a tokenizer that is trained, tags not counted.
        phases: the curriculum, fields of `Phase` each.
    """

    architecture: str = "deepseek"
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer_from: str | None = None
    vocab_size: int = 512
    phases: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"expected an architecture among {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        if not self.phases:
            raise ValueError("expected at least one phase, got none")
        self.curriculum = [checked(Phase, phase, f"phase {i}") for i, phase in enumerate(self.phases)]

    @property
    def inputs(self) -> list[str]:
        """Stages that this one reads."""
        return [self.tokenizer_from] if self.tokenizer_from else []


class _Documents(Dataset):
    """Documents by number: a resumed run needs none of those before."""

    def __init__(self, corpus: Corpus, tokenizer: Any, count: int) -> None:
        self.corpus, self.tokenizer, self.count = corpus, tokenizer, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> list[int]:
        return self.tokenizer("".join(self.corpus.document(number)), add_special_tokens=False)["input_ids"]


class _UntilSteps(TrainerCallback):
    """Ends a phase when single steps are right."""

    def __init__(self, policy: Policy, chains: Chains, phase: Phase, seed: int) -> None:
        self.policy, self.phase = policy, phase
        self.problems, self.forced = chains.draw(48, 10_000 + seed, "train"), chains.forced_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phase.until_steps is None or state.global_step % self.phase.check_every:
            return
        share = step_accuracy(self.policy, self.problems, TEMPLATES["zero-marks"], self.forced)
        state.log_history.append({"step": state.global_step, "eval/steps": share})
        if share >= self.phase.until_steps:
            control.should_training_stop = True


def pretrain(arguments: PretrainArguments, trainer_arguments: Mapping[str, Any], context: StageContext) -> None:
    """Trains a model from random weights and writes it with its tokenizer and its measures.

    Args:
        trainer_arguments: fields of `PretrainConfig`; `max_steps` is each phase's own.
    """
    watch, log = Stopwatch(), []
    for i, phase in enumerate(arguments.curriculum):
        done = context.work / f"phase-{i}.done"
        if not done.exists():
            log_of = _run_phase(i, phase, arguments, trainer_arguments, context)
            done.parent.mkdir(parents=True, exist_ok=True)
            part = done.with_suffix(".part")
            part.write_text(_lines(log_of), encoding="utf-8")
            part.replace(done)
        log += _read_lines(done)
    final = context.work / f"phase-{len(arguments.curriculum) - 1}" / "final"
    policy = Policy(load_model(final), load_tokenizer(final), arguments.batch_size)
    policy.save(context.model)
    values, texts = measure_policy(policy, arguments)
    chains = arguments.problems()
    if isinstance(chains, Chains):
        problems = chains.draw(48, 999, "test")
        values["steps"] = step_accuracy(policy, problems, TEMPLATES["zero-marks"], chains.forced_steps)
    values["parameters"] = sum(p.numel() for p in policy.model.parameters())
    save_stage(context, values, log, texts, watch.seconds())


def _run_phase(
    number: int, phase: Phase, arguments: PretrainArguments, values: Mapping[str, Any], context: StageContext
) -> list[dict[str, Any]]:
    set_seed(context.seed + number)
    folder = context.work / f"phase-{number}"
    chains = Chains(phase.nodes, phase.low, phase.high)
    corpus = Corpus(chains, phase.text, context.seed + number)
    before = context.work / f"phase-{number - 1}" / "final"
    if number:
        model, tokenizer = load_model(before), load_tokenizer(before)
    else:
        tokenizer = _tokenizer(arguments, context)
        model = _new_model(arguments, tokenizer)
    args = PretrainConfig(
        **trainer_values(
            {**values, **phase.trainer, "output_dir": str(folder), "max_steps": phase.max_steps,
             "remove_unused_columns": False, "label_names": ["labels"]},
            context,
        )
    )  # fmt: skip
    ours = isinstance(model, hf.DeepseekForCausalLM)
    if ours:
        model.config.mtp_loss_weight = args.mtp_loss_weight
    pad = tokenizer.pad_token_id
    trainer = Trainer(
        model,
        args,
        data_collator=lambda rows: _collate(rows, pad),
        train_dataset=_Documents(corpus, tokenizer, phase.max_steps * args.train_batch_size
                                 * args.gradient_accumulation_steps * args.world_size),
        callbacks=[hf.LoadBalancingCallback(args.balance_rate)] if ours and args.balance_rate else [],
    )  # fmt: skip
    trainer.add_callback(_UntilSteps(Policy(model, tokenizer), chains, phase, context.seed))
    log = train(trainer)
    if ours:
        model.config.mtp_loss_weight = 0.0
    Policy(model, tokenizer).save(folder / "final")
    return [{"phase": number, **entry} for entry in log]


def _collate(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _tokenizer(arguments: PretrainArguments, context: StageContext) -> Any:
    if arguments.tokenizer_from:
        return load_tokenizer(context.model_of(arguments.tokenizer_from))
    corpora = [
        Corpus(Chains(phase.nodes, phase.low, phase.high), phase.text, 1) for phase in arguments.curriculum
    ] + [Corpus(Chains(), "mixture", 1)]  # fmt: skip
    return train_tokenizer(corpora, arguments.vocab_size)


def _new_model(arguments: PretrainArguments, tokenizer: Any) -> Any:
    """Returns a model with random weights."""
    fields = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **arguments.model,
    }  # fmt: skip
    if arguments.architecture == "deepseek":
        return hf.DeepseekForCausalLM(DeepseekConfig(**fields))
    name = {"qwen2": "Qwen2", "llama": "Llama"}[arguments.architecture]
    config = getattr(transformers, f"{name}Config")(**fields)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
