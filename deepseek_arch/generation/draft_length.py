"""Number of tokens to draft, chosen by measured acceptance and time."""

from __future__ import annotations

__all__ = ["DraftLength"]


class DraftLength:
    """Chooses how many tokens to draft: the most expected tokens a second, by what was measured so far.

    Expected tokens of a step with k drafts: 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k, where a_j is the share of drafts at
    position j that were accepted, given that those before were. Seconds: what steps with k drafts took. Both are
    exponential averages, so that they follow the text; k = 0 is plain decoding, measured from time to time.

    Args:
        most: drafts at most.
        adapt: False always drafts `most`, but for a step in 64 without drafts, which is timed for comparison.
        cost: of a draft, relative to a step without drafts, in place of measured times: ranks that share collectives
            have clocks of their own, and have to choose alike.
    """

    _MEMORY = 0.95
    _PRIOR = 0.8  # optimistic, so that a position that was never tried is tried
    _EXPLORE = 12  # steps after which a neighbour of the best length is measured again

    def __init__(self, most: int, adapt: bool = True, cost: float | None = None) -> None:
        self.most, self.adapt, self.cost = most, adapt, cost
        self.rates = [self._PRIOR] * most
        self.seconds: list[float | None] = [None] * (most + 1)
        if cost is not None:
            self.seconds = [1 + cost * count for count in range(most + 1)]
        self._plain: list[float] = []
        self._step = 0

    def next(self) -> int:
        """Returns the number of drafts for the next step."""
        self._step += 1
        if self._step % 64 == 4:  # times plain decoding, for the report and for the choice
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

    def add_step(self, count: int, seconds: float, looked_at: list[int], accepted: list[int]) -> None:
        """Takes in a step: its drafts, its time, and by position how many drafts were looked at and accepted."""
        if count == 0:
            self._plain.append(seconds)
        if self.cost is None:
            known = self.seconds[count]
            # The least of two counts too: the first time of a length includes work that is done once.
            self.seconds[count] = seconds if known is None else min(seconds, 0.8 * known + 0.2 * seconds)
        for position, (a, d) in enumerate(zip(accepted, looked_at, strict=True)):
            weight = self._MEMORY**d
            if d:
                self.rates[position] = weight * self.rates[position] + (1 - weight) * a / d

    @property
    def plain_seconds(self) -> float:
        """Median time of a step without drafts."""
        ordered = sorted(self._plain)
        return ordered[len(ordered) // 2] if ordered else 0.0
