"""Proportions: languages, and reasoning to general data (600k to 200k in R1's second fine-tuning)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..tasks import Chat
from ..templates import Template
from .rows import Row

__all__ = ["balance_languages", "general_rows", "mix"]


def balance_languages(rows: Sequence[Row]) -> list[Row]:
    """Returns as many rows of each language as the rarest one has, the first ones; rows without a language all.

    A filter on language selects by language: after training without a language reward most of what it keeps may be in
    one of them.
    """
    counts: dict[str | None, int] = {}
    for row in rows:
        counts[row.language] = counts.get(row.language, 0) + 1
    least = min((count for language, count in counts.items() if language is not None), default=0)
    out, taken = [], dict.fromkeys(counts, 0)
    for row in rows:
        taken[row.language] += 1
        if row.language is None or taken[row.language] <= least:
            out.append(row)
    return out


def general_rows(
    chat: Chat, count: int, seed: int, template: Template, least_quality: float = 0.0, best: float | None = None
) -> list[Row]:
    """Returns general data of mixed quality, harmful responses left out: what supervised data of a base model has.

    Args:
        least_quality: of a response, on the scale of `Chat.responses`.
        best: share of the best response where there are others too; None for each of them alike.
    """
    rng = random.Random(f"general {seed}")
    rows = []
    for problem in chat.draw(count, seed):
        known = [text for text, quality in chat.responses(problem) if quality >= least_quality]
        thought = "" if chat.simple(problem) else chat.thought(problem)
        # R1's template writes the opening tag itself where it is prefilled.
        start = "" if template.prefilled else "<think> "
        written = f"{start}{thought} </think> " if thought or template.prefilled else ""
        rows.append(
            Row(problem.question, template.prompt(problem.question), written + _chosen(rng, known, best),
                problem.language, problem.kind)
        )  # fmt: skip
    return rows


def _chosen(rng: random.Random, known: Sequence[str], best: float | None) -> str:
    if best is None or len(known) == 1:
        return rng.choice(known)
    return known[0] if rng.random() < best else rng.choice(known[1:])


def mix(reasoning: Sequence[Row], general: Sequence[Row], ratio: float, seed: int) -> list[Row]:
    """Returns `ratio` rows of reasoning for each general one, as many as there are, in a drawn order.

    Raises:
        ValueError: a ratio that is not positive, or nothing of one of the two.
    """
    if not ratio > 0:
        raise ValueError(f"expected a ratio above 0, got {ratio}")
    if not reasoning or not general:
        raise ValueError(f"expected rows of both kinds, got {len(reasoning)} of reasoning and {len(general)} general")
    count = min(len(general), round(len(reasoning) / ratio))
    rows = [*reasoning[: round(count * ratio)], *general[:count]]
    random.Random(f"mix {seed}").shuffle(rows)
    return rows
