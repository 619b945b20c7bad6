"""Drafts of multi-token-prediction modules, and how many to make."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.causal_lm import DeepseekLM
from ..models.outputs import TrunkOutput

__all__ = ["DraftLength", "Drafter"]


class DraftLength:
    """Chooses how many tokens to draft: the most expected tokens a second, by what was measured so far.

    Expected tokens of a step with k drafts: 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k, where a_j is the share of drafts at
    position j that were kept, given that those before were. Seconds: what steps with k drafts took. Both are
    exponential averages, so that they follow the text; k = 0 is plain decoding, measured from time to time.

    Args:
        most: drafts at most.
        adapt: False always drafts `most`, but for a step in 64 without drafts, which is timed for comparison.
    """

    _MEMORY = 0.95
    _PRIOR = 0.8  # optimistic: a position that was never tried is
    _EXPLORE = 12  # steps after which a neighbour of the best length is measured again

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.most, self.adapt = most, adapt
        self.rates = [self._PRIOR] * most
        self.seconds: list[float | None] = [None] * (most + 1)
        self._plain: list[float] = []
        self._step = 0

    def next(self) -> int:
        """Drafts for the next step."""
        self._step += 1
        if self._step % 64 == 4:  # what plain decoding costs, for the report and for the choice
            return 0
        if not self.adapt:
            return self.most
        unknown = [k for k in range(self.most + 1) if self.seconds[k] is None]
        if unknown:
            return unknown[-1]
        best = max(range(self.most + 1), key=self._value)
        if self._step % self._EXPLORE == 0:
            up = (self._step // self._EXPLORE) % 2
            return min(best + 1, self.most) if up else max(best - 1, 1)
        return best

    def _value(self, count: int) -> float:
        expected = chain = 1.0
        for rate in self.rates[:count]:
            chain *= rate
            expected += chain
        return expected / (self.seconds[count] or 1e-9)

    def observe(self, count: int, seconds: float, looked_at: list[int], kept: list[int]) -> None:
        """Takes in a step: its drafts, its time, and by position how many drafts were looked at and kept."""
        if count == 0:
            self._plain.append(seconds)
        known = self.seconds[count]
        # The least of two counts too: the first time of a length includes what is done once.
        self.seconds[count] = seconds if known is None else min(seconds, 0.8 * known + 0.2 * seconds)
        for position, (a, d) in enumerate(zip(kept, looked_at, strict=True)):
            weight = self._MEMORY**d
            if d:
                self.rates[position] = weight * self.rates[position] + (1 - weight) * a / d

    @property
    def plain_seconds(self) -> float:
        """Median time of a step without drafts."""
        ordered = sorted(self._plain)
        return ordered[len(ordered) // 2] if ordered else 0.0


class Drafter:
    """Drafts tokens with the prediction layers, and keeps their caches in step with what was accepted.

    Between steps it holds the trunk's hidden states of the positions that the prediction layers have yet to run on:
    all those behind their caches, at least the last D, since layer d's view of the newest positions came from drafts.

    Args:
        model: has at least one prediction layer.
        depth: tokens drafted at most; beyond the number of layers, the last one is applied again to what it made.
        history: int64 [B, capacity], token i of row r at [r, i]; read, and written to beyond the known tokens.
    """

    def __init__(self, model: DeepseekLM, depth: int, history: Tensor) -> None:
        self.model, self.depth, self.history = model, depth, history
        self.layers = min(depth, len(model.mtp))
        batch, capacity = history.shape
        self.caches = [model.new_mtp_cache(batch, capacity, depth=layer) for layer in range(self.layers)]
        width = model.config.hidden_size
        self.trail = torch.empty(batch, 0, width, device=history.device, dtype=model.dtype)  # columns end at L - 1
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=history.device)  # L
        self.starts = torch.zeros_like(self.lengths)  # what the caches hold: the trail's first position

    def prefill(self, trunk: TrunkOutput, valid: Tensor | None) -> None:
        """Takes in the next piece of the prompts: rows end together, padding stands on the left.

        Args:
            valid: bool [B, T], or None where nothing is padding.
        """
        hidden = self.model.mtp_hidden(trunk)
        self.trail = torch.cat((self.trail, hidden), dim=1)
        self.lengths = self.lengths + (hidden.shape[1] if valid is None else valid.sum(-1))
        ready = self.trail.shape[1] - self.layers
        if ready > 0:
            hidden = self.trail[:, :ready]
            for layer in range(self.layers):
                hidden, _ = self._apply(layer, hidden, self.lengths - self.layers)
            self.starts = (self.lengths - self.layers).clamp(min=0)
            self.trail = self.trail[:, ready:]

    def _apply(self, layer: int, hidden: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """One layer on the columns of `hidden`, whose last belongs to position `ends` - 1 -> what `mtp_states` gives.

        Columns of positions that its cache holds are passed over.
        """
        cache, width = self.caches[layer], hidden.shape[1]
        positions = ends[:, None] - width + torch.arange(width, device=ends.device)  # [B, W]
        valid = positions >= torch.tensor(cache.lengths, device=ends.device)[:, None]
        ids = self.history.gather(1, (positions + layer + 1).clamp(0, self.history.shape[1] - 1))
        with cache.append(width, valid) as slots:
            mask = cache.spans(slots, valid)
            rope = self.model.model.rope(slots)
            return self.model.mtp_states(hidden, ids, layer, rope=rope, mask=mask, cache=cache)

    def draft(
        self, count: int, choose: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts `count` tokens behind the known ones.

        Args:
            count: from 1 to `depth`.
            choose: logits [B, vocab_size] -> tokens [B] and, when sampling, what they were drawn from.

        Returns:
            int64 [B, count], and float32 [B, count, vocab_size] or None.
        """
        rows = torch.arange(len(self.history), device=self.history.device)
        drafts, drawn_from = [], []
        hidden, ends = self.trail, self.lengths
        for step in range(max(count, self.layers)):
            layer = min(step, self.layers - 1)
            if step >= self.layers:
                # The last layer again, one position on: what it made of a position stands for the next one's state.
                hidden, ends = hidden[:, -1:], ends + 1
            hidden, normed = self._apply(layer, hidden, ends)
            if step < count:
                token, probabilities = choose(self.model.lm_head(normed[:, -1]))
                self.history[rows, self.lengths + 1 + step] = token
                drafts.append(token)
                if probabilities is not None:
                    drawn_from.append(probabilities)
        return torch.stack(drafts, 1), torch.stack(drawn_from, 1) if drawn_from else None

    def advance(self, trunk: TrunkOutput, gained: Tensor, drafted: bool) -> None:
        """Takes in the trunk's pass over the newest token and the drafts.

        Args:
            gained: int64 [B], by how much L grows: 1 + the drafts kept, or 0 for a row that stands still.
            drafted: whether the layers ran before this pass.
        """
        old, width = self.lengths, self.trail.shape[1]
        self.lengths = old + gained
        if drafted:  # layer d read token i + d + 1 at position i, which is certain up to the last known one
            self.starts = torch.minimum(old, self.lengths - self.layers).clamp(min=0)
            for cache in self.caches:
                cache.rewind(self.starts)
        behind = int((self.lengths - self.starts).max())
        last = width + gained - 1  # each row's newest column
        columns = (last[:, None] - behind + 1 + torch.arange(behind, device=last.device)).clamp(min=0)
        combined = torch.cat((self.trail, self.model.mtp_hidden(trunk)), dim=1)
        self.trail = combined.gather(1, columns[..., None].expand(-1, -1, combined.shape[-1]))
