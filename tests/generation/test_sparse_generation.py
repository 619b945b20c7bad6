"""Generation with sparse attention: caches in FP8, MTP drafts, compiled steps, rows of different length."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from support import published, small_models
from support.small_models import SPARSE_KINDS, config, tokens

PROMPT, NEW = 15, 12  # index_topk is 6


@pytest.fixture(params=SPARSE_KINDS)
def lm(request) -> da.DeepseekLM:
    cfg = config(request.param, num_nextn_predict_layers=1)
    return small_models.model(cfg, weights=published.random_weights(cfg))


def greedy(lm: da.DeepseekLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row's continuation without a cache or padding, [B, NEW]."""
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        text = row[real]
        for _ in range(NEW):
            with torch.no_grad():
                text = torch.cat((text, lm(text[None]).logits[0, -1:].argmax(-1)))
        rows.append(text[-NEW:])
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"mtp_depth": 1}, {"mtp_depth": 3}, {"prefill_chunk": 4}], ids=str)
def test_equals_decoding_without_a_cache(lm, options):
    ids, mask = tokens(lm.config, 2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :4] = 0
    got = da.generate(lm, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[], **options)
    assert torch.equal(got[:, PROMPT:], greedy(lm, ids, mask))


@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_do_not_change_the_text_of_an_fp8_cache(lm, depth):
    ids = tokens(lm.config, 2, PROMPT)
    plain = da.generate(lm, ids, max_new_tokens=NEW, eos_token_id=[], cache_format="fp8")
    again = da.generate(lm, ids, max_new_tokens=NEW, eos_token_id=[], cache_format="fp8", mtp_depth=depth)
    assert torch.equal(plain, again)


def test_compiled_steps(lm):
    ids = tokens(lm.config, 2, PROMPT)
    eager = da.generate(lm, ids, max_new_tokens=NEW, eos_token_id=[])
    assert torch.equal(da.generate(lm, ids, max_new_tokens=NEW, eos_token_id=[], compiled=True), eager)
