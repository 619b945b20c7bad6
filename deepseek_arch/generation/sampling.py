"""Tokens from logits: greedy or sampled, repeatable by a seed for any part of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sampler", "sampling_probabilities", "token_logprobs"]

# What float32 can divide by: a number below would become 0 and a largest logit 0 / 0, one above infinity.
_COLDEST, _HOTTEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Returns the distribution that tokens are drawn from: temperature, then the `top_k` best, then the nucleus.

    Args:
        logits: [..., vocab_size].
        temperature: above 0; as small as it may be, its limit is the most probable token.
        top_p: keeps the most probable tokens up to and including the one that brings their sum to `top_p`
            (arXiv 1904.09751), at least one.

    Returns:
        float32 [..., vocab_size], summing to 1; NaN throughout a row whose logits have NaN or +Inf, or only -Inf.
    """
    scores = logits.float() if temperature == 1 else _tempered(logits, temperature)
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # The sum before a token, without its own share: the token that crosses the threshold stays.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[..., 0] = False  # a threshold may be too small for float32
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), float("-inf"))
    return scores.softmax(-1)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the log-probability of each token, float32, under `softmax(logits / temperature)`.

    Neither `top_k` nor `top_p` takes part: this is what a policy-gradient loss recomputes from the logits.
    Temperature 0 counts as 1.

    Args:
        logits: [..., vocab_size].
        tokens: int64 [...].
    """
    scores = logits.float() if temperature in (0, 1) else _tempered(logits, temperature)
    return scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Returns float32 (logits - their largest) / temperature, at most 0, so that a tiny temperature cannot overflow."""
    wide = logits.float()
    return (wide - wide.amax(-1, keepdim=True)) / min(max(temperature, _COLDEST), _HOTTEST)


class Sampler:
    """Chooses tokens for the rows of a batch, by one temperature and one truncation.

    Random numbers are drawn for all rows of the batch, also for those that have left it: with the same seed a row gets
    the same tokens, whichever rows decode beside it.

    Args:
        batch_size: rows at the beginning.
        temperature: 0 takes the most probable token, the smallest id among equals.
        top_k, top_p: see `sampling_probabilities`.
        generator: source of random numbers; None for the global one.
    """

    def __init__(
        self,
        batch_size: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.batch_size, self.temperature, self.top_k, self.top_p = batch_size, temperature, top_k, top_p
        self.generator = generator
        self._rows: Tensor | None = None  # of the first batch; None for all of them

    @property
    def greedy(self) -> bool:
        """True for temperature 0."""
        return self.temperature == 0

    def keep_rows(self, index: Tensor) -> None:
        """Leaves only the rows `index`, int64, of those that are left."""
        self._rows = index if self._rows is None else self._rows[index]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns `sampling_probabilities` of logits [..., vocab_size] with this sampler's settings."""
        return sampling_probabilities(logits, self.temperature, self.top_k, self.top_p)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns a token for each row of logits [B, vocab_size], int64 [B], and its distribution unless greedy."""
        if self.greedy:
            return logits.argmax(-1), None
        probabilities = self.probabilities(logits)
        return self.draw(probabilities), probabilities

    def draw(self, probabilities: Tensor) -> Tensor:
        """Draws a token for each row of probabilities [B, vocab_size] -> int64 [B]."""
        if probabilities.device.type == "cpu" and probabilities.ndim == 2:
            return self._draw_by_sums(probabilities)
        # Exponential races, as in `torch.multinomial`: the smallest E_i / p_i falls on i with probability p_i.
        shape = (self.batch_size, *probabilities.shape[1:])
        noise = torch.empty(shape, device=probabilities.device, dtype=probabilities.dtype)
        return (probabilities / self._select(noise.exponential_(generator=self.generator))).argmax(-1)

    def _draw_by_sums(self, probabilities: Tensor) -> Tensor:
        """Looks up one uniform number a row among the sums of its probabilities: B random numbers, not B x V."""
        number = torch.rand(self.batch_size, 1, generator=self.generator, dtype=torch.float64)
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        # Below the last sum whatever is rounded, so that what is found has a probability above 0.
        found = torch.searchsorted(sums, self._select(number) * (sums[:, -1:] * (1 - 2**-52)), right=True)
        return found[:, 0].clamp_(max=probabilities.shape[1] - 1)  # of a row of NaN

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """Draws float32 [B, count], uniform in [0, 1)."""
        return self._select(torch.rand(self.batch_size, count, generator=self.generator, device=device))

    def _select(self, values: Tensor) -> Tensor:
        return values if self._rows is None else values[self._rows]
