"""Speculative decoding with the multi-token-prediction layers: several tokens a step, none of them another (V3 report,
section 5.4.3; arXiv 2302.01318 for the sampling).

A step drafts k tokens with the prediction layers, runs the trunk once on the newest token and the drafts, and keeps
the drafts that the trunk agrees with, plus the one token that the trunk says next. Rows accept differently, so every
row has its own length, and every cache is rewound row by row.

Notation: B rows, L tokens of a row that the trunk has run on, D prediction layers in use. Token 0 of a row is its first
real token; tokens 0 to L are known, the trunk has run on 0 to L - 1. Layer d of the prediction layers reads, at
position i, what layer d - 1 (or the trunk) made of it and the embedding of token i + d + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import sampling_probabilities

__all__ = ["accept"]


def accept(
    drafts: Tensor,
    draft_probabilities: Tensor | None,
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """How many drafts to keep, and the token that comes after them.

    Greedy: drafts are kept as long as they are the most probable token. Sampling: draft x, drawn from q, is kept with
    probability min(1, p(x) / q(x)), where p and q are after the same temperature and nucleus; the token behind the
    kept ones is drawn from max(p - q, 0), normalized, or from p where all were kept. What comes out is distributed as
    if it had been drawn from p (TRAPS F11).

    Args:
        drafts: int64 [B, k]; k may be 0.
        draft_probabilities: float32 [B, k, vocab_size], what each draft was drawn from; not needed when greedy.
        logits: [B, k + 1, vocab_size] of the trunk, for the token at each draft's place and the one behind.

    Returns:
        int64 [B] with the number of drafts kept, and int64 [B] with the token behind them.
    """
    count = drafts.shape[1]
    if temperature == 0:
        best = logits.argmax(-1)  # [B, k + 1]
        kept = (drafts == best[:, :count]).long().cumprod(-1).sum(-1)
        return kept, best.gather(1, kept[:, None])[:, 0]
    p = sampling_probabilities(logits, temperature, top_k, top_p)  # [B, k + 1, V]
    kept = torch.zeros(len(drafts), dtype=torch.int64, device=drafts.device)
    if count:
        q = draft_probabilities
        assert q is not None
        chosen = drafts[..., None]
        chances = torch.rand(drafts.shape, generator=generator, device=drafts.device)
        # u q < p rather than u < p / q: nothing to divide by, and a draft that p excludes never passes.
        passed = chances * q.gather(-1, chosen)[..., 0] < p[:, :count].gather(-1, chosen)[..., 0]
        kept = passed.long().cumprod(-1).sum(-1)
        # Beyond the last draft q counts as zero, and the rest is p itself.
        q = torch.cat((q, torch.zeros_like(p[:, :1])), dim=1)
        row = torch.arange(len(drafts), device=drafts.device)
        rest = (p[row, kept] - q[row, kept]).clamp(min=0)
        # Rounding may leave nothing where p and q agree; then what was rejected had no chance to be.
        p = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, kept])
    else:
        p = p[:, 0]
    return kept, torch.multinomial(p, 1, generator=generator)[:, 0]
