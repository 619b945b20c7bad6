"""Settings of one generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .finite_check import FiniteCheck
from .sampling import Sampler

__all__ = ["GenerationSettings"]

_FIRST_SLOTS = 1024  # slots for new tokens that a cache starts with; it grows


@dataclass(frozen=True)
class GenerationSettings:
    """Checked settings; see `generate` for those that are its arguments."""

    new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    end_tokens: Tensor
    pad_token: int
    generator: torch.Generator | None
    callback: Callable[[Tensor], object] | None
    prefill_chunk: int
    cache_format: str | None
    compiled: bool = False
    drop_finished: bool = False
    record_routing: bool = False
    return_logprobs: bool = False

    def capacity(self, prompt: int) -> int:
        """Returns the slots that a cache starts with."""
        return prompt + min(self.new_tokens, _FIRST_SLOTS)

    def sampler(self, batch_size: int) -> Sampler:
        """Returns a sampler for so many rows."""
        return Sampler(batch_size, self.temperature, self.top_k, self.top_p, self.generator)

    def finite_check(self, model: nn.Module) -> FiniteCheck:
        """Returns a check that looks before any token is handed out, and waits for a device only where others do."""
        waits = self.callback is not None or len(self.end_tokens) > 0
        return FiniteCheck(model, self.end_tokens.device, immediate=waits)

    def rows_to_keep(self, done: Tensor) -> Tensor | None:
        """Returns the rows that go on, int64, or None to keep all that are there.

        Finished rows leave once they are an eighth of the batch: each time, the caches of the others are copied.

        Args:
            done: bool [R].
        """
        if not self.drop_finished:
            return None
        finished = int(done.sum())
        return (~done).nonzero()[:, 0] if 8 * finished >= len(done) and finished < len(done) else None
