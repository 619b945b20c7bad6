"""How often drafts would be accepted on given text, whatever a model would have written itself.

Drafting along a model's own text measures two things at once: early in training that text repeats itself, and what
repeats is easily drafted. On fixed held-out text every step of training is asked the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.models.mtp_loss import shift_left

__all__ = ["GivenText", "held_out_rows", "on_given_text"]


@dataclass(frozen=True)
class GivenText:
    """One prediction depth on given text, with every token before the guessed one known.

    Attributes:
        accepted: share of the positions where its best guess is the trunk's own, so that greedy decoding keeps it.
        right: share of the positions where its best guess is the text's token.
        trunk_right: the same of the trunk, which is asked for those tokens one step later.
        both_right: share of the positions where both are: kept drafts that are more than the commonest token.
    """

    accepted: float
    right: float
    trunk_right: float
    both_right: float


def held_out_rows(text: Tensor, rows: int, length: int) -> Tensor:
    """Pieces of `text`, evenly spread, int64 [rows, length].

    Raises:
        ValueError: the text is shorter than a row.
    """
    if len(text) < length:
        raise ValueError(f"expected at least {length} tokens of text, got {len(text)}")
    starts = torch.linspace(0, len(text) - length, rows).long().tolist()
    return torch.stack([text[start : start + length] for start in starts]).long()


@torch.no_grad()
def on_given_text(model: da.DeepseekLM, rows: Tensor) -> list[GivenText]:
    """What each prediction depth guesses on `rows` [R, T], in evaluation mode; no depths that T is too short for.

    Depth k guesses, at position i, token i + k + 2 from the tokens up to i + k + 1: the trunk's guess from the same
    tokens is the one at position i + k + 1.
    """
    training = model.training
    model.eval()
    trunk = model.model(rows)
    trunk_guess = model.lm_head(trunk.hidden_states).argmax(-1)
    hidden, found = model.mtp_hidden(trunk), []
    for depth in range(min(len(model.mtp), rows.shape[1] - 2)):
        next_ids = shift_left(rows, depth + 1)
        logits, hidden = model.mtp_forward(hidden, next_ids, depth, rope=trunk.rope, mask=trunk.mask)
        truth = rows[:, depth + 2 :]
        guess, own = logits.argmax(-1)[:, : truth.shape[1]], trunk_guess[:, depth + 1 : -1]
        shares = (guess == own, guess == truth, own == truth, (guess == truth) & (own == truth))
        found.append(GivenText(*(float(share.float().mean()) for share in shares)))
    model.train(training)
    return found
