"""Report on a generation: drafted and accepted tokens, log-probabilities and routing of what was generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..moe.routing_record import RoutingRecord

__all__ = ["SpeculationReport"]


@dataclass
class SpeculationReport:
    """Steps and tokens of a generation, and what drafting was worth.

    Attributes:
        depth: tokens drafted in a step, at most.
        steps: passes of the main model after the prompt, one token each without drafts.
        row_steps: the same, counted once for each row that was not finished.
        tokens: tokens made by those, over all rows.
        drafted, accepted: by position in the draft, how many tokens the main model looked at, and accepted. A draft
            behind a rejected one is not counted.
        step_seconds: seconds of all steps; plain_seconds: median seconds of a step without drafts.
        logprobs: float32 [B, new], log-probabilities of the new tokens under `softmax(logits / temperature)`, or of the
            logits themselves when greedy, before `top_k` and `top_p`; 0 behind the end of a row. None unless asked for.
        routing: every routing decision for the tokens that were returned, prompts included; `routing.valid` is False
            for padding and behind the end of a row. None unless asked for.
    """

    depth: int
    steps: int = 0
    row_steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    step_seconds: float = 0.0
    plain_seconds: float = 0.0
    logprobs: Tensor | None = None
    routing: RoutingRecord | None = None

    def add_step(self, rows: int, tokens: int, looked_at: list[int], accepted: list[int], seconds: float) -> None:
        """Adds one pass of the main model.

        Args:
            rows: not finished before it; tokens: that they gained.
            looked_at, accepted: by position in the draft.
        """
        missing = [0] * (len(looked_at) - len(self.drafted))
        self.drafted += missing
        self.accepted += missing
        for position, (a, d) in enumerate(zip(accepted, looked_at, strict=True)):
            self.accepted[position] += a
            self.drafted[position] += d
        self.steps += 1
        self.row_steps += rows
        self.tokens += tokens
        self.step_seconds += seconds

    @property
    def acceptance(self) -> list[float | None]:
        """Share of the drafts looked at that were accepted, by position; None where none was looked at."""
        return [a / d if d else None for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row gained in a pass of the main model; 1 without drafts."""
        return self.tokens / self.row_steps if self.row_steps else 0.0

    @property
    def speedup(self) -> float | None:
        """Tokens a second over those of plain decoding, from the times of this very run; None before any step."""
        if not self.step_seconds or not self.plain_seconds:
            return None
        return self.tokens_per_step * self.steps * self.plain_seconds / self.step_seconds

    def __str__(self) -> str:
        shares = ", ".join("-" if share is None else f"{share:.0%}" for share in self.acceptance)
        speedup = "" if self.speedup is None else f", {self.speedup:.2f}x the speed of plain decoding"
        return f"acceptance {shares or '-'}; {self.tokens_per_step:.2f} tokens a step{speedup}"
