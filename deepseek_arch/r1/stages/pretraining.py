"""Stage 0, the base: a small model pretrained on generated text, by a curriculum (V3-Base's part in the paper)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

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
from .training import Stopwatch, last_complete, measure_policy, save_stage, train, trainer_values

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
        text, tables, lists, purities, general: see `Corpus`.
        responses_only: whether prompts are left out of the loss. Their numbers are drawn: nothing is learned from them.
        window: batches whose documents are sorted by length together, so that little of a batch is padding; 1 for
            batches with every kind of document, from which copying was learned in half of the steps.
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
    tables: float = 0.0
    lists: float | None = None
    purities: list[float] | None = None
    general: float = 0.06
    responses_only: bool = False
    window: int = 8
    max_steps: int = 100
    until_steps: float | None = None
    check_every: int = 50
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.max_steps, self.check_every, self.window) < 1:
            raise ValueError(
                f"expected max_steps, check_every and window >= 1, got {self.max_steps}, {self.check_every} and "
                f"{self.window}"
            )
        self.corpus(0)  # says what is wrong with the fields

    @property
    def chains(self) -> Chains:
        """The problems."""
        return Chains(self.nodes, self.low, self.high)

    def corpus(self, seed: int) -> Corpus:
        """Returns the documents of a seed."""
        return Corpus(self.chains, self.text, seed, self.tables, self.lists, self.purities, self.general)


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


Document = tuple[list[int], list[int]]  # tokens of the prompt, and of the rest


class _Documents(Dataset):
    """Documents by number: a resumed run needs none of those before.

    Those of `window` batches are sorted by length and the batches shuffled, so that little of a batch is padding.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, count: int, batch: int, window: int) -> None:
        self.corpus, self.tokenizer, self.count, self.batch = corpus, tokenizer, count, batch
        self.window = window
        self._rows: tuple[int, list[Document]] = (-1, [])  # of a window, with its number

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Document:
        window, place = divmod(number, self.window * self.batch)
        if window != self._rows[0]:
            self._rows = window, self._sorted(window)
        return self._rows[1][place]

    def _sorted(self, window: int) -> list[Document]:
        count, size = self.window * self.batch, self.batch
        texts = [self.corpus.document(window * count + i) for i in range(count)]
        parts = [self.tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*texts, strict=True)]
        rows = sorted(zip(*parts, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        random.Random(f"batches {self.corpus.seed} {window}").shuffle(batches)
        return [row for batch in batches for row in batch]


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
    corpus = phase.corpus(context.seed + number)
    before = context.work / f"phase-{number - 1}" / "final"
    if number:
        model, tokenizer = load_model(before), load_tokenizer(before)
    else:
        tokenizer = _tokenizer(arguments, context)
        model = _new_model(arguments, tokenizer)
    args = PretrainConfig(
        **trainer_values(
            {"train_sampling_strategy": "sequential", **values, **phase.trainer, "output_dir": str(folder),
             "max_steps": phase.max_steps, "remove_unused_columns": False, "label_names": ["labels"]},
            context,
        )
    )  # fmt: skip
    ours = isinstance(model, hf.DeepseekForCausalLM)
    if ours:
        model.config.mtp_loss_weight = args.mtp_loss_weight
    pad = tokenizer.pad_token_id
    count = phase.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer = Trainer(
        model,
        args,
        data_collator=lambda rows: _collate(rows, pad, phase.responses_only),
        train_dataset=_Documents(corpus, tokenizer, count, args.train_batch_size, phase.window),
        callbacks=[hf.LoadBalancingCallback(args.balance_rate)] if ours and args.balance_rate else [],
    )  # fmt: skip
    trainer.add_callback(_UntilSteps(Policy(model, tokenizer), phase.chains, phase, context.seed))
    ended = _ended(folder, phase)
    if ended is None:
        log = train(trainer)
    else:
        model, log = ended
    if ours:
        model.config.mtp_loss_weight = 0.0
    Policy(model, tokenizer).save(folder / "final")
    return [{"phase": number, **entry} for entry in log]


def _ended(folder: Path, phase: Phase) -> tuple[Any, list[dict[str, Any]]] | None:
    """Returns model and log of a phase that ended at its newest checkpoint, before that was noted; None for others.

    A trainer that resumes there would take further steps until it looks at the accuracy again.
    """
    found = last_complete(folder)
    if found is None or phase.until_steps is None:
        return None
    state = TrainerState.load_from_json(str(Path(found) / TRAINER_STATE_NAME))
    looks = [entry for entry in state.log_history if "eval/steps" in entry and entry["step"] == state.global_step]
    if not looks or looks[-1]["eval/steps"] < phase.until_steps:
        return None
    return load_model(found), [*state.log_history, {"epoch": state.epoch, "step": state.global_step}]


def _collate(rows: Sequence[Document], pad: int, responses_only: bool = False) -> dict[str, torch.Tensor]:
    width = max(len(prompt) + len(rest) for prompt, rest in rows)
    ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, rest) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(rest)
        ids[i, :end] = torch.tensor(prompt + rest)
        mask[i, :end] = 1
        first = start if responses_only else 0
        labels[i, first:end] = ids[i, first:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _tokenizer(arguments: PretrainArguments, context: StageContext) -> Any:
    if arguments.tokenizer_from:
        return load_tokenizer(context.model_of(arguments.tokenizer_from))
    # Shares of styles change nothing in the words.
    corpora = [*(Corpus(phase.chains, phase.text, 1, phase.tables) for phase in arguments.curriculum),
               Corpus(Chains(), "mixture", 1)]  # fmt: skip
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
