"""Masks as spans of keys: they say what the dense masks of the definition say, wherever they can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_arch.attention.masking import attention_mask_for_documents, document_numbers
from deepseek_arch.cache.latent_cache import key_mask_for_slots
from deepseek_kernels.common.masks import as_dense, causal_mask, is_spans


def _defined(documents, valid):
    """bool [T, T] of one row: a query sees itself, and the real tokens before it in its document."""
    tokens = len(valid)
    return torch.tensor(
        [
            [s == t or (s < t and documents[s] == documents[t] and valid[s]) for s in range(tokens)]
            for t in range(tokens)
        ]
    )


@st.composite
def _row(draw):
    """Document numbers and which tokens are real, of one row."""
    tokens = draw(st.integers(1, 9))
    starts = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    documents = torch.tensor(starts).long().cumsum(0).tolist()
    return documents, draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))


@given(_row(), st.booleans())
def test_real_tokens_see_what_the_definition_says(row, packed):
    documents, valid = row
    if not packed:
        documents = [0] * len(valid)
    mask = attention_mask_for_documents(torch.tensor([documents]) if packed else None, torch.tensor([valid]), batch=1)
    got = causal_mask(len(valid), len(valid)) if mask is None else as_dense(mask, len(valid))[0, 0]
    expected = _defined(documents, valid)
    for t, real in enumerate(valid):
        if real:
            assert torch.equal(got[t], expected[t]), t
        assert bool(got[t].any())  # no row of the softmax is empty


@pytest.mark.parametrize(
    ("documents", "valid", "kind"),
    [
        (None, [1, 1, 0], "none"),
        (None, [0, 1, 1], "spans"),
        (None, [1, 0, 1], "dense"),
        ([0, 0, 1], [1, 1, 1], "spans"),
        ([0, 0, 1, 1], [0, 1, 1, 0], "spans"),
        ([0, 0, 0, 1], [1, 0, 1, 1], "dense"),
    ],
)
def test_only_interrupted_documents_need_a_dense_mask(documents, valid, kind):
    mask = attention_mask_for_documents(
        None if documents is None else torch.tensor([documents]), torch.tensor([valid]) != 0, batch=1
    )
    assert ("none" if mask is None else "spans" if is_spans(mask) else "dense") == kind


def test_documents_of_one_row_are_those_of_all():
    documents = document_numbers(torch.tensor([[0, 1, 0, 1, 2]]))
    mask = attention_mask_for_documents(documents, None, batch=3)
    assert mask.dtype == torch.int32
    assert mask.tolist() == [[[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]]] * 3


def test_slots_see_the_slots_up_to_their_own():
    slots = torch.tensor([[2, 3], [0, 0]])
    mask = key_mask_for_slots(slots, (2, 0), torch.tensor([[True, True], [True, False]]))
    assert as_dense(mask, 4)[:, 0].int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 0, 0, 0]]]
    assert key_mask_for_slots(torch.tensor([[2], [2]]), (2, 2), None) is None


def test_spans_are_cut_to_the_keys_and_may_be_empty():
    spans = torch.tensor([[[-3, 2], [1, 9], [2, 2], [3, 1]]], dtype=torch.int32)
    assert as_dense(spans, 3)[0, 0].int().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
