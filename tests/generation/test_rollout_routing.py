"""Rollouts whose routing is replayed in training: recorded while generating, taken again over the whole sequence."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.moe.routing_record import routing_agreement
from support.agreeing import agreeing
from support.small_models import config, error, model, tokens

# Generating and training multiply the same numbers in another order.
ROUNDING = 1e-4


def replayed(lm, out, routing):
    """A training pass over what was generated -> its output, and its own record."""
    mask = None if routing.valid is None else routing.valid.long()
    labels = out if mask is None else out.masked_fill(mask == 0, -100)
    return lm.train()(out, mask, labels=labels, record_routing=True, replay_routing=routing)


@pytest.mark.parametrize("drafts", [1, 3])
def test_accepted_drafts_are_recorded_as_they_were_run(drafts):
    """Drafts that are right some of the time; the routing is that of a pass over the text."""
    lm = agreeing(noise=0.1)
    ids = tokens(lm.config, 4, 5)
    settings = {"max_new_tokens": 40, "eos_token_id": [], "mtp_depth": drafts, "adaptive": False}
    out, report = da.generate(lm, ids, record_routing=True, **settings)
    assert 0.1 < report.acceptance[0] < 0.95, "a test of nothing"
    own = lm(out, record_routing=True)
    assert report.routing.shape == out.shape and report.routing.valid is None
    assert set(routing_agreement(report.routing, own.routing).same.values()) == {1.0}
    plain, expected = da.generate(lm, ids, max_new_tokens=40, eos_token_id=[], record_routing=True)
    assert torch.equal(plain, out)
    assert all(torch.equal(report.routing.ids[layer], expected.routing.ids[layer]) for layer in (1, 2))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rollout_is_replayed_whole(temperature, chunk):
    lm = model(config("v3", num_nextn_predict_layers=1))
    ids = tokens(lm.config, 2, 5)
    settings = {"max_new_tokens": 6, "temperature": temperature, "seed": 3, "eos_token_id": []}
    out, report = da.generate(lm, ids, prefill_chunk=chunk, record_routing=True, **settings)
    assert torch.equal(out, da.generate(lm, ids, **settings))
    assert report.routing.shape == out.shape == (2, 11) and report.routing.valid is None
    assert report.steps == 5  # the pass for the last token's routing makes none
    again = replayed(lm, out, report.routing)
    recorded = report.routing.ids.keys()
    assert recorded == {1, 2}  # the main model's layers; the MTP module decides for itself
    again.routing.ids = {layer: again.routing.ids[layer] for layer in recorded}
    assert set(routing_agreement(report.routing, again.routing).same.values()) == {1.0}
    again.loss.backward()
    assert lm.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_a_model_that_moved_on_takes_the_rollouts_decisions():
    """Replay's purpose: the trainer's own choice differs, and the logits are those of the rollout's experts."""
    lm = model(config("v3"))
    out, report = da.generate(lm, tokens(lm.config, 2, 5), max_new_tokens=8, eos_token_id=[], record_routing=True)
    with torch.no_grad():
        for layer in lm.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias += torch.randn(8)
    own = lm(out, record_routing=True)
    assert routing_agreement(report.routing, own.routing).same[1] < 0.9, "a test of nothing"
    again = replayed(lm, out, report.routing)
    assert set(routing_agreement(report.routing, again.routing).same.values()) == {1.0}
    # Biases choose and do not weigh: with the choice replayed, nothing of the change is left.
    assert error(again.logits, model(config("v3"))(out).logits) < ROUNDING


@pytest.mark.parametrize("how", ["plain", "dropping rows", "drafts", "drafts, dropping rows"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_ended_rows_are_marked(side, how):
    """In every way of decoding: rejected drafts leave no trace, and every token's decisions are there once."""
    lm = model(config("v3", num_nextn_predict_layers=1))
    ways = {"mtp_depth": 2 if "drafts" in how else 0, "drop_finished": "dropping" in how}
    ids, mask = tokens(lm.config, 3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, slice(2) if side == "left" else slice(4, 6)] = 0
    free = da.generate(lm, ids, mask, max_new_tokens=6, eos_token_id=[])
    end = int(free[0, 7])  # the first row ends with its second token
    settings = {"max_new_tokens": 6, "eos_token_id": end, "pad_token_id": 0}
    out, report = da.generate(lm, ids, mask, record_routing=True, **ways, **settings)
    assert torch.equal(out, da.generate(lm, ids, mask, **settings))
    routing = report.routing
    assert routing.shape == out.shape
    assert torch.equal(routing.valid[:, :6], mask.bool())
    for row, fresh in enumerate(out[:, 6:].tolist()):
        length = fresh.index(end) + 1 if end in fresh else len(fresh)
        assert routing.valid[row, 6:].tolist() == [column < length for column in range(len(fresh))]
    assert not routing.valid[0, 8:].any() and routing.valid[0, :8].all()
    assert int(routing.valid.sum(-1).min()) < routing.shape[1]
    again = replayed(lm, out, routing)
    again.routing.ids = {layer: again.routing.ids[layer] for layer in routing.ids}
    assert routing.ids.keys() == {1, 2}
    assert set(routing_agreement(routing, again.routing).same.values()) == {1.0}
    # The decisions are those of a pass over the same tokens, not only taken again: ties aside, it would decide so.
    own = lm.eval()(out, routing.valid.long(), record_routing=True)
    assert own.routing.ids.keys() == routing.ids.keys()
    for layer, margins in routing.margins.items():
        assert (margins[routing.valid] - own.routing.margins[layer][routing.valid]).abs().max() < ROUNDING
    assert set(routing_agreement(routing, own.routing).same.values()) == {1.0}


def test_every_row_ending_at_once():
    lm = model(config("v3"))
    ids = tokens(lm.config, 1, 4)
    end = int(da.generate(lm, ids, max_new_tokens=1, eos_token_id=[])[0, -1])
    out, report = da.generate(lm, ids, max_new_tokens=5, eos_token_id=end, record_routing=True)
    assert out.shape == report.routing.shape == (1, 5) and report.routing.valid is None and report.steps == 0


def test_what_cannot_be_recorded():
    lm = model(config("v3", num_nextn_predict_layers=1))
    ids = tokens(lm.config, 1, 4)
    with pytest.raises(ValueError, match="compiled=False with record_routing"):
        da.generate(lm, ids, compiled=True, record_routing=True)
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        da.generate(lm, ids, max_new_tokens=0, record_routing=True)
    with pytest.raises(ValueError, match="model with experts"):
        da.generate(model(config("v3", first_k_dense_replace=3)), ids, record_routing=True)
    _, report = da.generate(lm, ids, max_new_tokens=2, return_report=True)
    assert report.routing is None


def test_tokens_that_were_not_run_have_distinct_experts():
    """A record is replayed as it is: an expert that stands there twice would be computed and counted twice."""
    lm = model(config("v3"))
    ids = tokens(lm.config, 2, 5)
    free = da.generate(lm, ids, max_new_tokens=4, eos_token_id=[])[:, 5:].tolist()
    end = next(token for token in free[0] if token not in free[1])
    settings = {"max_new_tokens": 4, "eos_token_id": end, "drop_finished": True, "record_routing": True}
    _, report = da.generate(lm, ids, **settings)
    valid = report.routing.valid
    assert valid is not None and not valid.all()
    for chosen in report.routing.ids.values():
        assert all(len(set(row)) == chosen.shape[-1] for row in chosen[~valid].tolist())
