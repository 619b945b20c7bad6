"""Sampling and plain decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .model import DeepseekLM

__all__ = ["generate", "sample", "sampling_probabilities"]


def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that tokens are drawn from: temperature, then the `top_k` best, then the nucleus of `top_p`.

    Args:
        logits: [..., vocab_size].
        top_p: keeps the most probable tokens up to and including the one that brings their sum to `top_p`
            (arXiv 1904.09751).

    Returns:
        float32 [..., vocab_size], summing to 1.
    """
    logits = logits.float()
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature  # a tiny temperature must not overflow
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # What comes before a token, not up to it: the token that crosses the threshold stays.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), float("-inf"))
    return scores.softmax(-1)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Chooses a token for each row of logits [B, vocab_size] -> int64 [B]; greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = sampling_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    mtp_depth: int = 0,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    callback: Callable[[Tensor], None] | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Continues prompts.

    Args:
        input_ids: int [B, T]; prompts of different length are padded, on the left or on the right.
        attention_mask: [B, T], nonzero for prompt tokens.
        max_new_tokens: tokens to add at most.
        mtp_depth: tokens to draft per step with the multi-token-prediction layers; only 0 is possible yet.
        temperature: 0 takes the most probable token.
        top_k, top_p: restrict sampling to the best tokens.
        eos_token_id: tokens that end a row (default: the config's; an empty list for none).
        pad_token_id: what a finished row is filled with (default: the config's, else its first end token).
        seed: makes sampling repeatable; the global random state is neither used nor changed then.
        callback: called with the new tokens [B] of each step, as they come.
        prefill_chunk: tokens of the prompt to run at a time (default: all), to bound the memory of long prompts.

    Returns:
        int64 [B, T + new] token ids, prompt included. Shorter than T + max_new_tokens when every row has ended.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(model, input_ids, attention_mask, max_new_tokens, mtp_depth, temperature, top_k, top_p, prefill_chunk)
    ends = _end_tokens(model, eos_token_id, input_ids.device)
    pad = pad_token_id if pad_token_id is not None else model.config.pad_token_id
    pad = pad if pad is not None else (int(ends[0]) if len(ends) else 0)
    generator = None if seed is None else torch.Generator(device=input_ids.device).manual_seed(seed)
    batch, prompt = input_ids.shape
    tokens = torch.full((batch, prompt + max_new_tokens), pad, dtype=torch.int64, device=input_ids.device)
    tokens[:, :prompt] = input_ids
    if max_new_tokens == 0:
        return tokens
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        cache = model.new_cache(batch, capacity=prompt + max_new_tokens)
        logits = _prefill(model, input_ids, attention_mask, cache, prefill_chunk or prompt)
        done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        for position in range(prompt, prompt + max_new_tokens):
            new = sample(logits, temperature, top_k, top_p, generator)
            tokens[:, position] = new.masked_fill(done, pad)
            if callback is not None:
                callback(tokens[:, position])
            done = done | torch.isin(new, ends)
            if len(ends) and bool(done.all()):
                return tokens[:, : position + 1]
            if position + 1 < prompt + max_new_tokens:
                # A finished row goes on with what it sampled: `pad` need not be in the vocabulary.
                logits = model(new[:, None], cache=cache).logits[:, -1]
        return tokens
    finally:
        for module, mode in modes.items():
            module.training = mode


def _prefill(model: DeepseekLM, input_ids: Tensor, attention_mask: Tensor | None, cache, chunk: int) -> Tensor:
    """Runs the prompts into the cache -> logits [B, vocab_size] of each row's last prompt token."""
    batch, prompt = input_ids.shape
    last = torch.full((batch,), prompt - 1, device=input_ids.device)
    if attention_mask is not None:
        last = prompt - 1 - (attention_mask != 0).long().flip(-1).argmax(-1)
    logits = torch.empty(0)
    for start in range(0, prompt, chunk):
        ids = input_ids[:, start : start + chunk]
        mask = None if attention_mask is None else attention_mask[:, start : start + chunk]
        here = (last - start).clamp(0, ids.shape[1] - 1)[:, None]
        chosen = model(ids, mask, cache=cache, logits_to_keep=here).logits[:, 0]
        logits = chosen if start == 0 else torch.where((last >= start)[:, None], chosen, logits)
    return logits


def _end_tokens(model: DeepseekLM, eos_token_id: int | Iterable[int] | None, device) -> Tensor:
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return torch.tensor(ends, dtype=torch.int64, device=device)


def _check(model, input_ids, attention_mask, max_new_tokens, mtp_depth, temperature, top_k, top_p, chunk) -> None:
    problems = []
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"expected input_ids to be a tensor [B, T], got {type(input_ids).__name__}")
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        problems.append(f"expected input_ids [B, T] with T >= 1, got {list(input_ids.shape)}")
    elif attention_mask is not None and attention_mask.shape != input_ids.shape:
        problems.append(f"expected attention_mask {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    elif attention_mask is not None and not bool((attention_mask != 0).any(-1).all()):
        problems.append("expected at least one prompt token in every row, got a row of padding only")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        problems.append(f"expected an integer max_new_tokens >= 0, got {max_new_tokens!r}")
    if mtp_depth:
        problems.append(f"expected mtp_depth 0 (speculative decoding is not implemented yet), got {mtp_depth}")
    if not 0 <= temperature < math.inf:
        problems.append(f"expected a finite temperature >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        problems.append(f"expected top_k >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"expected top_p in (0, 1], got {top_p}")
    if chunk is not None and chunk < 1:
        problems.append(f"expected prefill_chunk >= 1, got {chunk}")
    if problems:
        raise ValueError("; ".join(problems))
