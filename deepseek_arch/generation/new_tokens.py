"""New tokens of rows that grow unevenly."""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import token_logprobs
from .settings import GenerationSettings

__all__ = ["NewTokens"]


class NewTokens:
    """Collects the new tokens of each row, up to its end token, and hands them to the callback column by column.

    Args:
        batch: rows of the result, B.

    Attributes:
        made: int64 [B], new tokens of each row.
    """

    def __init__(self, batch: int, settings: GenerationSettings) -> None:
        self.settings, device = settings, settings.end_tokens.device
        self.made = torch.zeros(batch, dtype=torch.int64, device=device)
        self._ended = torch.zeros(batch, dtype=torch.bool, device=device)
        shape = (batch, settings.new_tokens)
        self._tokens = torch.full(shape, settings.pad_token, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(shape, device=device) if settings.return_logprobs else None
        self._sent = 0

    def add(self, rows: Tensor, fresh: Tensor, gained: Tensor, logits: Tensor) -> int:
        """Appends tokens to R rows, and returns how many were taken: those up to an end token and up to the limit.

        Args:
            rows: int64 [R], rows of the result.
            fresh: int64 [R, n], the tokens.
            gained: int64 [R], the number of them that count.
            logits: [R, n, vocab_size] that the tokens were chosen from.
        """
        columns = torch.arange(fresh.shape[1], device=fresh.device)
        ending = torch.isin(fresh, self.settings.end_tokens) & (columns < gained[:, None])
        ends = ending.any(-1)
        until = torch.where(ends, ending.long().argmax(-1) + 1, gained)
        more = torch.minimum(until, self.settings.new_tokens - self.made[rows])
        taken = columns < more[:, None]
        place = (rows[:, None].expand_as(fresh)[taken], (self.made[rows][:, None] + columns)[taken])
        self._tokens[place] = fresh[taken]
        if self._logprobs is not None:
            self._logprobs[place] = token_logprobs(logits[taken], fresh[taken], self.settings.temperature)
        self.made[rows] += more
        self._ended[rows] |= ends
        return int(more.sum())

    def finished(self, rows: Tensor) -> Tensor:
        """Returns bool [R], True for rows that have ended or reached the limit."""
        return self._ended[rows] | (self.made[rows] >= self.settings.new_tokens)

    def missing(self, rows: Tensor) -> int:
        """Returns the most tokens that one of the rows, int64 [R], has yet to gain."""
        return int((self.settings.new_tokens - self.made[rows]).max())

    def emit(self, running: Tensor) -> None:
        """Hands over the columns that no row can change any more.

        Args:
            running: int64, the rows that have not finished.
        """
        if self.settings.callback is None:
            return
        ready = int(self.made[running].min() if len(running) else self.made.max())
        for column in range(self._sent, ready):
            self.settings.callback(self._tokens[:, column])
        self._sent = max(self._sent, ready)

    def tokens(self) -> Tensor:
        """Returns int64 [B, new], padded behind the end of each row."""
        return self._tokens[:, : int(self.made.max())]

    def logprobs(self) -> Tensor | None:
        """Returns float32 [B, new], 0 behind the end of each row, or None where they are not collected."""
        return None if self._logprobs is None else self._logprobs[:, : int(self.made.max())]
