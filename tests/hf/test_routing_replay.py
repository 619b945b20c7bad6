"""Routing of rollouts replayed in transformers' class: the same experts and log-probs, whatever the padding."""

from __future__ import annotations

import copy

import pytest
import torch

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models


@pytest.fixture
def model(folder_of):
    made = dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3", num_nextn_predict_layers=1), dtype=torch.float32)
    return made.eval()


@pytest.fixture
def batch(model):
    ids = small_models.tokens(model.config.to_core(), 4, 9, seed=1)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5, 1)):
        mask[row, :padding] = 0
    return ids, mask


def log_probs(logits, ids):
    return logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def moved(model):
    """A copy with routers that choose otherwise."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, da.Router):
            module.e_score_correction_bias.add_(torch.randn_like(module.e_score_correction_bias))
    return other


def test_recording_changes_nothing_and_replaying_it_neither(model, batch):
    ids, mask = batch
    plain = model(ids, attention_mask=mask)
    assert plain.routing is None
    recorded = model(ids, attention_mask=mask, record_routing=True)
    assert torch.equal(recorded.logits, plain.logits)
    assert recorded.routing.shape == (4, 9) and len(recorded.routing.ids) == 2
    replayed = model(ids, attention_mask=mask, replay_routing=recorded.routing, record_routing=True)
    torch.testing.assert_close(replayed.logits, plain.logits)
    assert set(da.routing_agreement(recorded.routing, replayed.routing).same.values()) == {1.0}


def test_the_record_is_that_of_the_core(model, batch, folder_of):
    ids, mask = batch
    core = da.load(folder_of("v3", num_nextn_predict_layers=1), dtype=torch.float32)
    expected = core(ids, attention_mask=mask, record_routing=True).routing
    record = model(ids, attention_mask=mask, record_routing=True).routing
    assert set(da.routing_agreement(expected, record).same.values()) == {1.0}
    torch.testing.assert_close(record.margins[1][mask.bool()], expected.margins[1][mask.bool()])


def rolled(tensor, shifts):
    return torch.stack([row.roll(-shift, 0) for row, shift in zip(tensor, shifts, strict=True)])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
def test_a_rollout_is_replayed_under_any_padding(model, padding, mode):
    """The native engine's experts in the trainer's forward, minibatches shuffled, though the routers have moved."""
    ids = small_models.tokens(model.config.to_core(), 6, 7, seed=2)
    mask = torch.ones_like(ids)
    for row in range(6):
        mask[row, : row % 4] = 0
    core = da.DeepseekLM(model.config.to_core(), dtype=torch.float32)
    core.load_state_dict(model.state_dict())
    tokens, report = da.generate(
        core.eval(), ids, mask, 6, temperature=1.0, eos_token_id=[], pad_token_id=0, seed=0, record_routing=True
    )
    full, routing = torch.cat((mask, torch.ones(6, 6, dtype=mask.dtype)), 1), report.routing
    if padding == "right":
        shifts = [int(row.argmax()) for row in mask]
        tokens, full = rolled(tokens, shifts), rolled(full, shifts)
        routing = da.RoutingRecord({layer: rolled(ids, shifts) for layer, ids in routing.ids.items()}, {}, full.bool())
    with torch.no_grad():
        expected = log_probs(core(tokens, attention_mask=full, replay_routing=routing).logits, tokens)
    other = moved(model)
    if mode != "eval":
        other.train()
    if mode == "checkpointing":
        other.gradient_checkpointing_enable()
    order = torch.randperm(6)
    for rows in order.split(2):
        ids_of = {layer: ids[rows] for layer, ids in routing.ids.items()}
        part = da.RoutingRecord(ids_of, {}, full[rows].bool())
        with dhf.replaying(other, part):
            out = other(tokens[rows], attention_mask=full[rows], use_cache=False, record_routing=True)
        assert set(da.routing_agreement(part, out.routing).same.values()) == {1.0}
        found = log_probs(out.logits, tokens[rows])
        real = full[rows][:, 1:].bool() & full[rows][:, :-1].bool()
        assert float((found.detach() - expected[rows])[real].abs().max()) < 1e-5
        if mode != "eval":
            found[real].sum().backward()
    free = other(tokens, attention_mask=full, record_routing=True).routing
    assert min(da.routing_agreement(routing, free).same.values()) < 1.0


def test_weights_of_replayed_experts_are_differentiable(model, batch):
    ids, mask = batch
    record = model(ids, attention_mask=mask, record_routing=True).routing
    other = moved(model).train()
    with dhf.replaying(other, record):
        other(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    routers = [module for module in other.model.modules() if isinstance(module, da.Router)]
    assert all(float(router.weight.grad.abs().sum()) > 0 for router in routers)
    # The loads are those of the experts that were used.
    expected = torch.bincount(record.ids[1][mask.bool()].flatten().long(), minlength=8)
    assert torch.equal(routers[0].load, expected)


def test_replaying_ends_with_its_block_and_nests(model, batch):
    ids, mask = batch
    record = model(ids, attention_mask=mask, record_routing=True).routing
    with pytest.raises(RuntimeError, match="inside"), dhf.replaying(model, record):
        with dhf.replaying(model, None):
            assert model.model.replayed_routing is None
        assert model.model.replayed_routing is record
        raise RuntimeError("inside")
    assert model.model.replayed_routing is None


def test_what_cannot_be_replayed_is_refused(model, batch):
    ids, mask = batch
    record = model(ids, attention_mask=mask, record_routing=True).routing
    with pytest.raises(ValueError, match="decisions for"), dhf.replaying(model, record):
        model(ids[:, :5])
    with pytest.raises(ValueError, match=r"deepseek_arch\.hf"), dhf.replaying(torch.nn.Linear(2, 2), record):
        pass
