"""Report on drafted and accepted tokens of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..moe.routing_record import RoutingRecord

__all__ = ["SpeculationReport"]


@dataclass
class SpeculationReport:
    """What drafting was worth.

    Attributes:
        depth: tokens drafted in a step, at most.
        steps: passes of the trunk after the prompt, one token each without drafts.
        row_steps: the same, counted once for each row that was not finished.
        tokens: tokens made by those, over all rows.
        drafted, accepted: by position in the draft, how many tokens the trunk looked at, and kept. A draft behind a
            rejected one is not counted.
        step_seconds: seconds of all steps; plain_seconds: seconds that a step without drafts took (median).
        routing: every routing decision for the tokens that were returned, prompts included, where it was asked for;
            `routing.valid` is False for padding and behind the end of a row.
    """

    depth: int
    steps: int = 0
    row_steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    step_seconds: float = 0.0
    plain_seconds: float = 0.0
    routing: RoutingRecord | None = None

    @property
    def acceptance(self) -> list[float | None]:
        """By position, the share of the drafts looked at that were kept; None where none was."""
        return [a / d if d else None for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row gained in a pass of the trunk; 1 without drafts."""
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
