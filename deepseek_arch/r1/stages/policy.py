"""A trained model with its tokenizer, to be sampled from: ours by `deepseek_arch.generate`, others by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ... import hf
from ...generation.entry import generate
from ...hf.mtp_generation import core_of
from ..checks import check_lengths
from ..rollouts import Rollout, Sampling, _cut, _left_padded, sample_natively
from ..trainer.config import base_model

__all__ = ["Policy", "load_model", "load_tokenizer", "registered_models"]


@contextmanager
def registered_models() -> Iterator[None]:
    """Has transformers' Auto classes give this package's, and undoes that."""
    before = hf.registered()
    hf.register()
    try:
        yield
    finally:
        if not before:
            hf.unregister()


def load_model(folder: str | Path, dtype: str = "auto", factory: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """Returns the model in a folder, of this package's classes where they know it.

    Raises:
        ValueError, OSError: transformers', for a folder without a model.
    """
    with registered_models():
        return factory.from_pretrained(str(folder), dtype=dtype, **kwargs)


def load_tokenizer(folder: str | Path, pad_token: str | None = None) -> Any:
    """Returns the tokenizer in a folder, padding on the left.

    Args:
        pad_token: to pad with instead of its own.

    Raises:
        ValueError: it does not have that token.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(f"expected a pad_token that the tokenizer of {str(folder)!r} has, got {pad_token!r}")
        tokenizer.pad_token = pad_token
    return tokenizer


class Policy:
    """A model with its tokenizer; see `evaluation.Sampler` and `gate.Predictor` for the methods.

    Args:
        model: a causal language model of transformers, or a wrapper that adapters put around it.
        tokenizer: the model's.
        batch_size: rows that are sampled at once; rows of like length go together.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 256) -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        self.model, self.tokenizer, self.batch_size = base_model(model), tokenizer, batch_size
        self.native = isinstance(self.model, hf.DeepseekForCausalLM)
        self.end_tokens: tuple[int, ...] = (tokenizer.eos_token_id,)
        self.pad_token: int = tokenizer.pad_token_id
        self._core: Any = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        batch_size: int = 256,
        device: str = "cpu",
        dtype: str = "auto",
        pad_token: str | None = None,
    ) -> Policy:
        """Loads a checkpoint with its tokenizer."""
        return cls(load_model(folder, dtype).to(device), load_tokenizer(folder, pad_token), batch_size)

    @property
    def experts(self) -> int:
        """Routed experts of a layer, 0 for a dense model."""
        return int(getattr(self.model.config, "n_routed_experts", None) or 0) if self.native else 0

    @property
    def drafts(self) -> bool:
        """True for a model with prediction layers."""
        return self.native and len(self.model.mtp) > 0

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Returns the token ids of a prompt; text is taken as it is, without special tokens added."""
        if not isinstance(prompt, str):
            prompt = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of a completion, its tags and its marks included, its end token not."""
        ids = list(ids)
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.end_tokens else ids)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, record_routing: bool = False) -> Rollout:
        """Returns a completion for each prompt, in their order; the global random state is left as it was.

        Raises:
            ValueError: drafts or routing of a model of another library.
        """
        if not self.native and (record_routing or sampling.mtp_depth):
            raise ValueError(f"expected a DeepSeek model for drafts and routing, got {type(self.model).__name__}")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        parts = []
        for start in range(0, len(order), self.batch_size):
            rows = [list(prompts[i]) for i in order[start : start + self.batch_size]]
            seeded = replace(sampling, seed=None if sampling.seed is None else sampling.seed + start)
            parts.append(self._sample_natively(rows, seeded, record_routing) if self.native else
                         self._sample_with_transformers(rows, seeded))  # fmt: skip
        return _in_order(parts, order)

    def stream(self, prompt: Sequence[int], sampling: Sampling, take: Callable[[Sequence[int]], object]) -> bool:
        """Samples one completion and gives its tokens as they come; those of other libraries' models all at once.

        Returns:
            True if the completion ended by itself.
        """
        if not self.native:
            rollout = self._sample_with_transformers([list(prompt)], sampling)
            take(rollout.completions[0])
            return rollout.ended[0]
        if self._core is None:
            self._core = core_of(self.model)
        last = self.pad_token

        def step(tokens: Any) -> None:
            nonlocal last
            last = int(tokens[-1])
            take([int(tokens[-1])])

        generate(
            self._core, torch.tensor([list(prompt)], device=self.model.device), None, sampling.max_new_tokens,
            sampling.mtp_depth, sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            eos_token_id=sampling.end_tokens, pad_token_id=sampling.pad_token, seed=sampling.seed, callback=step,
        )  # fmt: skip
        return last in sampling.end_tokens

    def _sample_natively(self, rows: list[list[int]], sampling: Sampling, record_routing: bool) -> Rollout:
        if self._core is None:
            self._core = core_of(self.model)
        return sample_natively(self._core, rows, sampling, record_routing)

    @torch.no_grad()
    def _sample_with_transformers(self, rows: list[list[int]], sampling: Sampling) -> Rollout:
        longest, device = max(map(len, rows)), self.model.device
        check_lengths(longest, sampling.max_new_tokens, getattr(self.model.config, "max_position_embeddings", None))
        ids, mask = _left_padded(rows, sampling.pad_token, device)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None, top_k=sampling.top_k or 0, top_p=sampling.top_p or 1.0,
            eos_token_id=list(sampling.end_tokens), pad_token_id=sampling.pad_token,
        )  # fmt: skip
        training = self.model.training
        devices = [device] if device.type == "cuda" else []
        try:
            self.model.eval()
            with torch.random.fork_rng(devices, enabled=sampling.seed is not None):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        finally:
            self.model.train(training)
        completions, ended = _cut(made[:, longest:].tolist(), sampling.end_tokens)
        return Rollout(rows, completions, ended)

    @torch.no_grad()
    def predict(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Returns for each token of each row the most probable token after it."""
        training, out = self.model.training, []
        self.model.eval()
        try:
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                ids, mask = _left_padded(part, self.pad_token, self.model.device)
                best = self.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
                out += [best[i, ids.shape[1] - len(row) :].tolist() for i, row in enumerate(part)]
        finally:
            self.model.train(training)
        return out

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer; ours in the published layout."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def _in_order(parts: Sequence[Rollout], order: Sequence[int]) -> Rollout:
    """Returns the rows of several rollouts as one, row `i` of them all at place `order[i]`."""
    places = sorted(range(len(order)), key=order.__getitem__)

    def joined(name: str) -> Any:
        lists = [getattr(part, name) for part in parts]
        if any(rows is None for rows in lists):
            return None
        flat = [row for rows in lists for row in rows]
        return [flat[i] for i in places]

    def summed(name: str) -> list[int]:
        lists = [getattr(part, name) for part in parts]
        return [sum(values) for values in zip(*lists, strict=False)] if all(lists) else []

    return Rollout(
        joined("prompts"), joined("completions"), joined("ended"), joined("logprobs"), summed("drafted"),
        summed("accepted"), joined("routing"), parts[0].layers if parts else (),
    )  # fmt: skip
