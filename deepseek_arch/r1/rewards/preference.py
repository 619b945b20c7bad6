"""Rewards of trained models: helpfulness, which reads final summaries, and harmlessness, which reads everything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..templates import END, Template, up_to_end
from .base import Reward, completion_text
from .rules import _template

__all__ = ["ModelReward"]

_OPENED = re.compile(r"<think>\n?\Z")


class ModelReward(Reward):
    """The score of a sequence classifier with one label; None for problems of other kinds.

    The model reads the prompt, the summary or the whole response, and the end token: the text that it was trained on.
    TRL's own reward models are given no end token (TRAPS T5). A response without a summary, one that still thinks at
    its last token, gets the lowest score of its batch.

    Args:
        model: a module whose `logits` are [B, 1], on `input_ids` and `attention_mask`, in evaluation mode.
        tokenizer: the model's; its pad token and its end token differ.
        template: the form of the responses.
        reads: "summary", as R1's helpfulness model, or "all", as its harmlessness model.
        kinds: problems that it applies to.
        name: what trainers log it by.
        active_from: share of the training steps without it. R1 used preference rewards in the last 400 of 1,700 steps
            only, since more of them is hacked (arXiv 2501.12948, B.5).
        batch_size: responses that are read at once.
        bounded: whether to return the sigmoid of the score, the probability of a point-wise model.

    Raises:
        ValueError: an argument out of range, or a tokenizer without distinct pad and end tokens.
    """

    columns = ("kind",)

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template | str,
        *,
        reads: str = "summary",
        kinds: Sequence[str] = ("general",),
        name: str = "helpful",
        active_from: float = 0.0,
        batch_size: int = 64,
        bounded: bool = False,
    ) -> None:
        super().__init__(name)
        if reads not in ("summary", "all"):
            raise ValueError(f"expected reads 'summary' or 'all', got {reads!r}")
        if not 0 <= active_from <= 1 or batch_size < 1:
            raise ValueError(f"expected active_from in [0, 1] and batch_size >= 1, got {active_from}, {batch_size}")
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            raise ValueError(
                "expected a reward model's tokenizer with a pad token other than its end token, got "
                f"{tokenizer.pad_token_id} and {tokenizer.eos_token_id}"
            )
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"expected a reward model with one label, got {labels}")
        rows = getattr(config, "vocab_size", None)
        if rows is not None and rows < len(tokenizer):
            raise ValueError(f"expected a reward model for {len(tokenizer)} tokens, got one for {rows}")
        self.model, self.tokenizer, self.template, self.reads = model, tokenizer, _template(template), reads
        self.kinds, self.active_from, self.batch_size, self.bounded = tuple(kinds), active_from, batch_size, bounded

    def read(self, prompt: str | Sequence[Mapping[str, Any]], text: str) -> str | None:
        """Returns what the model is given, None for a response without what it reads."""
        parsed = self.template.parse(text, needs_answer=False)
        if self.reads == "summary" and (parsed.summary is None or not parsed.summary.strip()):
            return None
        if isinstance(prompt, str):
            start = prompt
        else:
            start = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        if self.reads == "summary":
            # The prompt's opening tag would announce thoughts that are left out.
            return _OPENED.sub("", start) + (parsed.summary or "").strip() + self.tokenizer.eos_token
        return start + up_to_end(text).removesuffix(END) + self.tokenizer.eos_token

    def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any] | None = None,
        completion_ids: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Returns the scores; see `Reward`. `trainer_state` tells how far the training is."""
        if prompts is None or "kind" not in columns:
            raise ValueError(f"expected prompts and the column 'kind' for {self.__name__}, got neither or one")
        state = columns.get("trainer_state")
        if self.active_from and state is not None and state.global_step < self.active_from * state.max_steps:
            return [None] * len(completions)
        rows = [i for i, kind in enumerate(columns["kind"]) if kind in self.kinds]
        texts = {i: self.read(prompts[i], completion_text(completions[i])) for i in rows}
        scores = self.scores_of([text for text in texts.values() if text is not None])
        lowest = min(scores, default=0.0)
        out: list[float | None] = [None] * len(completions)
        given = iter(scores)
        for i, text in texts.items():
            out[i] = lowest if text is None else next(given)
        return out

    def scores_of(self, texts: Sequence[str]) -> list[float]:
        """Returns the model's score of each text, read in order of length."""
        import torch

        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            encoded = self.tokenizer(
                [texts[i] for i in part],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                logits = self.model(
                    input_ids=encoded["input_ids"].to(device), attention_mask=encoded["attention_mask"].to(device)
                ).logits[:, 0]
            values = (logits.sigmoid() if self.bounded else logits).float().tolist()
            for i, value in zip(part, values, strict=True):
                scores[i] = value
        return scores
