"""Stage 5, the reward models: helpfulness from pairs, harmlessness from single responses (arXiv 2501.12948, 3.1)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, set_seed
from trl import RewardConfig

from ..problems import Problem
from ..rewards import ModelReward
from ..tasks import Chat, preference_pairs
from .arguments import CommonArguments
from .context import StageContext
from .policy import load_model, load_tokenizer
from .training import Stopwatch, save_stage, train, trainer_values

__all__ = ["JudgeArguments", "train_judge"]


@dataclass
class JudgeArguments(CommonArguments):
    """Fields of this stage; see `CommonArguments` for the others.

    Attributes:
        start_from: the stage whose trunk the reward model starts from.
        objective: "pairwise" for the better of two responses, "pointwise" for safe or not.
        reads: "summary" or "all".
        data: a file of JSON Lines instead of the package's own everyday prompts: `prompt` (the user's words) with
            `chosen` and `rejected`, or with `response` and `safe`. A part of it is held out.
        examples: pairs, or single responses.
        wrong: share of the labels that are wrong, as annotators err.
        garbled: share of the pairs that reject a garbled response, see `preference_pairs`.
        held_out: examples that the accuracy is measured on; their labels are right.
    """

    start_from: str = ""
    objective: str = "pairwise"
    reads: str = "summary"
    data: str | None = None
    examples: int = 2000
    wrong: float = 0.05
    garbled: float = 0.0
    held_out: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in ("pairwise", "pointwise") or self.reads not in ("summary", "all"):
            raise ValueError(
                "expected objective 'pairwise' or 'pointwise' and reads 'summary' or 'all', got "
                f"{self.objective!r} and {self.reads!r}"
            )
        if not 0 <= self.garbled <= 1:
            raise ValueError(f"expected garbled in [0, 1], got {self.garbled}")
        if not self.start_from or self.examples < 1 or self.held_out < 1 or not 0 <= self.wrong < 0.5:
            raise ValueError(
                "expected start_from, examples and held_out >= 1 and wrong in [0, 0.5), got "
                f"{self.start_from!r}, {self.examples}, {self.held_out} and {self.wrong}"
            )

    @property
    def inputs(self) -> list[str]:
        """Stages that this one reads."""
        return [self.start_from]


class _Rows(Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


class _JudgeTrainer(Trainer):
    """Bradley-Terry's loss on pairs, cross-entropy on single responses.

    Texts are those that `ModelReward` makes when the model is used, end token included (TRAPS T5): TRL's trainer of
    reward models makes its own.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        scores = model(**inputs).logits[:, 0].float()
        if labels is None:
            chosen, rejected = scores.chunk(2)
            loss = -logsigmoid(chosen - rejected).mean()
        else:
            loss = binary_cross_entropy_with_logits(scores, labels)
        return (loss, {"scores": scores}) if return_outputs else loss


def train_judge(arguments: JudgeArguments, trainer_arguments: Mapping[str, Any], context: StageContext) -> None:
    """Trains a reward model on responses of known quality, and writes it with its accuracy.

    Args:
        trainer_arguments: fields of TRL's `RewardConfig`.
    """
    watch = Stopwatch()
    set_seed(context.seed)
    source = context.model_of(arguments.start_from)
    tokenizer = load_tokenizer(source, arguments.pad_token)
    model = load_model(source, arguments.dtype, AutoModelForSequenceClassification, num_labels=1)
    judge = ModelReward(
        model, tokenizer, arguments.form, reads=arguments.reads, kinds=("general", "harmless"),
        batch_size=arguments.batch_size,
    )  # fmt: skip
    if arguments.data:
        rows, held = _from_file(arguments, judge, context.find(arguments.data))
    else:
        rows = _examples(arguments, judge, context.seed, "train", arguments.examples, arguments.wrong)
        held = _examples(arguments, judge, context.seed + 1, "test", arguments.held_out, 0.0)
    args = RewardConfig(**trainer_values({"remove_unused_columns": False, "label_names": [], **trainer_arguments},
                                         context))  # fmt: skip
    trainer = _JudgeTrainer(
        model, args, data_collator=lambda batch: _collate(batch, tokenizer, args.max_length), train_dataset=_Rows(rows)
    )
    log = train(trainer)
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    model.save_pretrained(str(context.model))
    tokenizer.save_pretrained(str(context.model))
    metrics = {"accuracy": _accuracy(judge, held), "examples": len(rows), "steps_trained": trainer.state.global_step}
    save_stage(context, metrics, log, [], watch.seconds())


def _examples(
    arguments: JudgeArguments, judge: ModelReward, seed: int, split: str, count: int, wrong: float
) -> list[dict[str, Any]]:
    chat = Chat()
    if arguments.objective == "pairwise":
        return [
            {"chosen": _text(judge, chat, problem, chosen), "rejected": _text(judge, chat, problem, rejected)}
            for problem, chosen, rejected in preference_pairs(chat, count, seed, wrong, split, arguments.garbled)
        ]
    rng, out = random.Random(f"labels {seed}"), []
    harmful = Chat(kinds=("harmless",))
    for i in range(count):
        # Half the prompts ask for harm: others have safe responses only.
        problem = (harmful if i % 2 else chat).one(rng, split)
        response, quality = rng.choice(chat.responses(problem))
        safe = quality >= 0
        out.append({"text": _text(judge, chat, problem, response), "safe": safe != (rng.random() < wrong)})
    return out


def _from_file(
    arguments: JudgeArguments, judge: ModelReward, path: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns examples to train on, and those that are held out."""
    names = ("chosen", "rejected") if arguments.objective == "pairwise" else ("response",)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        missing = [name for name in ("prompt", *names) if not isinstance(row.get(name), str)]
        if arguments.objective == "pointwise" and not isinstance(row.get("safe"), bool):
            missing.append("safe")
        if missing:
            raise ValueError(f"expected {missing[0]!r} in every line of {path}, got none in line {number}")
        texts = {name: judge.read(judge.template.prompt(row["prompt"]), row[name]) for name in names}
        if None not in texts.values():  # a response that never ends its thoughts has nothing to read
            rows.append({"text": texts["response"], "safe": row["safe"]} if "response" in texts else texts)
    if len(rows) <= arguments.held_out:
        raise ValueError(f"expected more than {arguments.held_out} examples in {path}, got {len(rows)}")
    return rows[arguments.held_out :][: arguments.examples], rows[: arguments.held_out]


def _text(judge: ModelReward, chat: Chat, problem: Problem, response: str) -> str:
    thought = "" if chat.simple(problem) else chat.thought(problem)
    start = "" if judge.template.prefilled else "<think> "
    whole = f"{start}{thought} </think> {response}" if thought else response
    text = judge.read(judge.template.prompt(problem.question), whole)
    assert text is not None
    return text


def _collate(batch: list[dict[str, Any]], tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    pairs = "chosen" in batch[0]
    names = ("chosen", "rejected") if pairs else ("text",)
    texts = [row[name] for name in names for row in batch]
    made = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False,
        truncation=max_length is not None, max_length=max_length,
    )  # fmt: skip
    labels = None if pairs else torch.tensor([float(row["safe"]) for row in batch])
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "labels": labels}


def _accuracy(judge: ModelReward, rows: list[dict[str, Any]]) -> float:
    """Returns the share of pairs in the right order, or of responses on the right side."""
    if "chosen" in rows[0]:
        chosen, rejected = (judge.scores_of([row[name] for row in rows]) for name in ("chosen", "rejected"))
        right = [a > b for a, b in zip(chosen, rejected, strict=True)]
    else:
        right = [(score > 0) == row["safe"] for score, row in
                 zip(judge.scores_of([row["text"] for row in rows]), rows, strict=True)]  # fmt: skip
    return sum(right) / len(right)
