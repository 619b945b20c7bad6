"""Finished rows leave the batch: the tokens, log-probabilities and routing of every row stay what they were."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.generation.sampling import token_logprobs
from support.small_models import config, error, model, tokens

# One row or many, one token or several at a time: the same float32 products in another order.
ROUNDING = 1e-4
ROWS, PROMPT, NEW = 12, 6, 24


@pytest.fixture(scope="module")
def lm():
    lm = model(config("v3", num_nextn_predict_layers=1))
    with torch.no_grad():
        lm.lm_head.weight.mul_(3)  # telling apart, so that sampled tokens do not hang on rounding
    return lm


@pytest.fixture
def ends(lm):
    """Two end tokens that make some rows end early, some late."""
    free = da.generate(lm, tokens(lm.config, ROWS, PROMPT), max_new_tokens=NEW, eos_token_id=[])[:, PROMPT:]
    return [int(free[0, 2]), int(free[1, 11]), int(free[2, 7])]


def padded(lm):
    ids, mask = tokens(lm.config, ROWS, PROMPT), torch.ones(ROWS, PROMPT, dtype=torch.long)
    for row in range(1, ROWS, 3):
        mask[row, : row % 5] = 0
    return ids, mask


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_same_tokens_and_fewer_rows(lm, ends, temperature, drafts):
    ids, mask = padded(lm)
    settings = {
        "max_new_tokens": NEW,
        "temperature": temperature,
        "top_p": 0.9,
        "seed": 5,
        "eos_token_id": ends,
        "pad_token_id": 60,
        "mtp_depth": drafts,
        "adaptive": False,
    }
    rows, columns, dropped = [], [], []
    hook = lm.model.embed_tokens.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    expected = da.generate(lm, ids, mask, callback=columns.append, **settings)
    assert set(rows) == {ROWS}
    rows.clear()
    got = da.generate(lm, ids, mask, drop_finished=True, callback=dropped.append, **settings)
    hook.remove()
    assert torch.equal(got, expected)
    assert torch.equal(torch.stack(dropped, 1), torch.stack(columns, 1)) and dropped[0].shape == (ROWS,)
    assert min(rows) < ROWS / 2 and rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_one_pass_over_the_text(lm, ends, temperature, drafts, drop):
    ids, mask = padded(lm)
    out, report = da.generate(
        lm, ids, mask, max_new_tokens=NEW, temperature=temperature, top_k=20, seed=1, eos_token_id=ends, pad_token_id=0,
        mtp_depth=drafts, drop_finished=drop, return_logprobs=True,
    )  # fmt: skip
    new = out[:, PROMPT:]
    lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new.tolist()]
    real = torch.arange(new.shape[1]) < torch.tensor(lengths)[:, None]
    assert report.logprobs.shape == new.shape and report.logprobs.dtype == torch.float32
    assert (report.logprobs[~real] == 0).all() and not real.all()
    with torch.no_grad():
        logits = lm(out, torch.cat((mask, real.long()), 1)).logits[:, PROMPT - 1 : -1]
    expected = (logits.double() / (temperature or 1.0)).log_softmax(-1).gather(-1, new[..., None])[..., 0]
    assert error(report.logprobs[real], expected[real]) < ROUNDING


def test_token_logprobs_of_a_hand_made_case():
    logits = torch.tensor([[0.0, 2.0]]).log_softmax(-1) * 3
    expected = torch.log_softmax(torch.tensor([0.0, 1.0], dtype=torch.float64) * 6 / 1.5, 0)
    got = token_logprobs(logits, torch.tensor([0]), 1.5)
    assert error(got, expected[:1].float()) < 1e-6


@pytest.mark.parametrize("drop", [False, True])
def test_a_rollout_of_one_row_leaves_nothing_to_drop(lm, drop):
    ids = tokens(lm.config, 1, 4)
    end = int(da.generate(lm, ids, max_new_tokens=1, eos_token_id=[])[0, -1])
    out, report = da.generate(
        lm, ids, max_new_tokens=9, eos_token_id=end, drop_finished=drop, return_logprobs=True, mtp_depth=1
    )
    assert out.shape == (1, 5) and report.logprobs.shape == (1, 1) and report.steps == 0


def test_a_fixed_batch_cannot_shrink(lm):
    with pytest.raises(ValueError, match="drop_finished=False with compiled=True"):
        da.generate(lm, tokens(lm.config, 2, 4), compiled=True, drop_finished=True)
