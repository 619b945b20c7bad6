"""Tokens of a step that several rows gain at once: up to the end token, to the limit, and to what was accepted."""

from __future__ import annotations

import torch

from deepseek_arch.generation.new_tokens import NewTokens
from deepseek_arch.generation.settings import GenerationSettings

PAD, END = 9, 7


def collector(batch: int, new_tokens: int, callback=None) -> NewTokens:
    ends = torch.tensor([END])
    return NewTokens(batch, GenerationSettings(new_tokens, 0.0, None, None, ends, PAD, None, callback, 8, None))


def test_tokens_behind_an_end_token_are_not_taken():
    """Drafts go on behind it; of four accepted tokens the second one ends row 0."""
    new = collector(3, 6)
    fresh = torch.tensor([[1, END, 2, 3], [1, 2, 3, 4], [1, 2, END, 3]])
    taken = new.add(torch.arange(3), fresh, torch.tensor([4, 3, 2]), torch.zeros(3, 4, 10))
    assert taken == 2 + 3 + 2 and new.made.tolist() == [2, 3, 2]
    assert new.tokens().tolist() == [[1, END, PAD], [1, 2, 3], [1, 2, PAD]]
    assert new.finished(torch.arange(3)).tolist() == [True, False, False]  # row 2's end token was not accepted


def test_the_limit_counts_too_and_columns_are_sent_once_no_row_changes_them():
    seen = []
    new = collector(2, 3, lambda column: seen.append(column.tolist()))
    rows = torch.arange(2)
    new.add(rows, torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1]), torch.zeros(2, 2, 10))
    new.emit(rows)
    assert seen == [[1, 3]] and new.missing(rows) == 2
    new.add(rows, torch.tensor([[5, 6], [END, 8]]), torch.tensor([2, 2]), torch.zeros(2, 2, 10))
    new.emit(rows[~new.finished(rows)])
    assert new.tokens().tolist() == [[1, 2, 5], [3, END, PAD]] and new.finished(rows).all()
    assert seen == [[1, 3], [2, END], [5, PAD]]
