"""From logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample", "sampling_probabilities"]


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
