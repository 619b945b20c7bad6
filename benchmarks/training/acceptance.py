"""Acceptance of drafts on given text, independent of what the model would have written.

Drafting along a model's own text measures two things at once: early in training that text repeats itself, and
repetition is easily drafted. On fixed held-out text every step of training is asked the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.models.mtp_loss import shift_left

__all__ = ["GivenText", "on_given_text"]


@dataclass(frozen=True)
class GivenText:
    """Guesses of one MTP depth on given text, with every token before the guessed one known.

    Attributes:
        accepted: share of the positions where its best guess is the main model's, so that greedy decoding keeps it.
        right: share of the positions where its best guess is the text's token.
        main_right: the same of the main model, which guesses those tokens one step later.
        both_right: share of the positions where both are right: accepted drafts other than mere frequent tokens.
    """

    accepted: float
    right: float
    main_right: float
    both_right: float


@torch.no_grad()
def on_given_text(model: da.DeepseekLM, rows: Tensor) -> list[GivenText]:
    """Compares the guesses of each MTP depth on `rows` [R, T], in evaluation mode; skips depths that need more tokens.

    Depth k guesses, at position i, token i + k + 2 from the tokens up to i + k + 1: the main model's guess from the
    same tokens is the one at position i + k + 1.
    """
    training = model.training
    model.eval()
    out = model.model(rows)
    main_guess = model.lm_head(out.hidden_states).argmax(-1)
    hidden = model.mtp_hidden(out)
    depths = []
    for depth in range(min(len(model.mtp), rows.shape[1] - 2)):
        logits, hidden = model.mtp_forward(hidden, shift_left(rows, depth + 1), depth, rope=out.rope, mask=out.mask)
        truth = rows[:, depth + 2 :]
        guess, main = logits.argmax(-1)[:, : truth.shape[1]], main_guess[:, depth + 1 : -1]
        shares = (guess == main, guess == truth, main == truth, (guess == truth) & (main == truth))
        depths.append(GivenText(*(float(share.float().mean()) for share in shares)))
    model.train(training)
    return depths
