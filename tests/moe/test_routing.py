"""Routing decisions as data: recorded, replayed, compared."""

import pytest
import torch

from deepseek_arch.moe.moe import Router
from deepseek_arch.moe.routing_record import RoutingRecord, routing_agreement
from support.small_models import config, error, model, tokens


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
def test_a_record_holds_what_every_router_chose(kind):
    lm = model(config(kind))
    ids = tokens(lm.config, 2, 9)
    seen = {}
    for layer in lm.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda r, _, out, i=layer.layer_idx: seen.update({i: out[2]}))
    record = lm(ids, record_routing=True).routing
    assert record.ids.keys() == {1, 2} == seen.keys() and record.shape == (2, 9)
    for layer, chosen in seen.items():
        assert record.ids[layer].dtype == torch.int16
        assert torch.equal(record.ids[layer].long().flatten(0, 1), chosen)
    assert lm(ids).routing is None


def test_replaying_its_own_record_changes_nothing():
    lm = model(config("v3", num_nextn_predict_layers=1)).train()
    ids = tokens(lm.config, 2, 9)
    first = lm(ids, labels=ids, record_routing=True)
    assert first.routing.ids.keys() == {1, 2, 3}
    again = lm(ids, labels=ids, replay_routing=first.routing)
    assert torch.equal(first.logits, again.logits) and torch.equal(first.mtp_loss, again.mtp_loss)


@pytest.mark.parametrize("recompute", [False, True])
def test_replay_fixes_the_experts_and_leaves_the_weights_differentiable(recompute):
    """The routers disagree with the record, take it, and learn from it; recomputed layers too."""
    lm, other = model(config("v3")), model(config("v3"), seed=9)
    ids = tokens(lm.config, 2, 9)
    record = other(ids, record_routing=True).routing
    lm.train()
    lm.gradient_checkpointing_enable(recompute)
    out = lm(ids, labels=ids, record_routing=True, replay_routing=record)
    assert all(torch.equal(out.routing.ids[layer], record.ids[layer]) for layer in record.ids)
    out.loss.backward()
    own = lm(ids, record_routing=True).routing
    assert routing_agreement(own, record).same[1] < 0.9, "a test of nothing"
    gate = lm.model.layers[1].mlp.gate
    logits, weights, chosen = gate(torch.randn(4, 32), torch.tensor([[0, 1, 2]] * 4))
    s = logits.sigmoid()[:, :3]
    assert chosen.tolist() == [[0, 1, 2]] * 4
    assert error(weights, 2.5 * s / s.sum(-1, keepdim=True)) < 1e-6
    assert gate.weight.grad.abs().max() > 0
    grad = gate.weight.grad.clone()
    lm.zero_grad()
    lm.gradient_checkpointing_enable(not recompute)
    lm(ids, labels=ids, replay_routing=record).loss.backward()
    assert torch.equal(gate.weight.grad, grad)


def test_a_rollout_is_replayed_in_training():
    """Recorded while decoding with a cache, put together, replayed in one pass."""
    lm = model(config("v3", num_nextn_predict_layers=1))
    ids = tokens(lm.config, 2, 9)
    cache = lm.new_cache(2)
    record = lm(ids[:, :5], cache=cache, record_routing=True).routing
    for step in range(5, 9):
        record = record.concat(lm(ids[:, step : step + 1], cache=cache, record_routing=True).routing)
    whole = lm(ids, record_routing=True).routing
    assert record.shape == (2, 9) and all(torch.equal(record.ids[i], whole.ids[i]) for i in (1, 2))
    assert set(routing_agreement(record, whole).same.values()) == {1.0}
    trained = lm.train()(ids, labels=ids, replay_routing=record)  # the prediction layer decides for itself
    assert trained.mtp_loss.isfinite()


def test_margins_are_the_gap_to_another_choice():
    router = Router(16, 8, 2, n_group=4, topk_group=2)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias)
    logits = router(torch.randn(30, 16))[0]
    margins = router.margins(logits)
    choice = logits.sigmoid() + router.e_score_correction_bias
    for t in range(30):
        groups = choice[t].view(4, 2).sum(-1)
        kept = groups.sort(descending=True).indices[:2]
        inside = sorted((float(choice[t, 2 * g + i]) for g in kept.tolist() for i in range(2)), reverse=True)
        expected = min(inside[1] - inside[2], float(groups.sort(descending=True).values[1:3].diff().abs()))
        assert float(margins[t]) == pytest.approx(expected, abs=1e-6)
    everything = Router(16, 4, 4, n_group=1)
    assert everything.margins(torch.randn(3, 4)).tolist() == [float("inf")] * 3


def test_agreement():
    first = RoutingRecord({3: torch.tensor([[[0, 1], [2, 3], [4, 5]]])}, {3: torch.tensor([[0.1, 0.2, 0.3]])})
    second = RoutingRecord({3: torch.tensor([[[1, 0], [2, 7], [6, 7]]])})
    agreement = routing_agreement(first, second)
    assert agreement.same == {3: pytest.approx(1 / 3)} and agreement.overlap == {3: 0.5}
    assert agreement.margin == {3: pytest.approx(0.2)}
    assert "33.33%" in str(agreement)
    first.valid = torch.tensor([[True, False, False]])
    assert routing_agreement(first, second).same == {3: 1.0}
    assert routing_agreement(first, second).margin == {3: None}


def test_records_that_do_not_fit():
    lm = model(config("v3"))
    ids = tokens(lm.config, 2, 9)
    record = lm(ids, record_routing=True).routing
    with pytest.raises(ValueError, match=r"decisions for \[2, 8\] tokens, got \[2, 9\]|\(2, 9\)"):
        lm(ids[:, :8], replay_routing=record)
    missing = RoutingRecord({1: record.ids[1]})
    with pytest.raises(ValueError, match=r"layers \[1, 2\], got none for \[2\]"):
        lm(ids, replay_routing=missing)
    wide = RoutingRecord({layer: ids.repeat(1, 1, 2) for layer, ids in record.ids.items()})
    with pytest.raises(ValueError, match="3 experts for layer 1, got 6"):
        lm(ids, replay_routing=wide)
    with pytest.raises(ValueError, match=r"layers \[1, 2\] and 2 rows, got layers \[1\] and 2 rows"):
        record.concat(missing)
    with pytest.raises(ValueError, match="records of the same layers"):
        routing_agreement(record, missing)


def test_texts_that_a_model_in_training_mode_generates_are_not_counted():
    """TRAPS D3: rollouts run without gradients, often in training mode."""
    lm = model(config("v3")).train()
    ids = tokens(lm.config, 2, 9)
    with torch.no_grad():
        lm(ids)
    assert all(layer.mlp.gate.load is None for layer in lm.model.layers[1:])


@pytest.mark.parametrize("pad", [0, 9])
def test_what_pads_changes_nothing_in_the_prediction_layers(pad):
    """TRAPS D3, F8: their last positions read the embedding of padding, or of nothing, and are routed by it."""
    results = []
    for fill in (3, pad):
        lm = model(config("v3", num_nextn_predict_layers=2, aux_loss_alpha=1.0)).train()
        ids, mask = tokens(lm.config, 2, 9), torch.ones(2, 9, dtype=torch.long)
        ids[1, 6:], mask[1, 6:] = fill, 0
        out = lm(ids, mask, labels=ids)
        (out.loss + out.mtp_loss).backward()
        gates = [layer.mlp.gate for layer in (*lm.model.layers[1:], *lm.mtp)]
        balance = out.aux_loss + out.mtp_aux_losses.sum()
        results.append((balance, [gate.load for gate in gates], [gate.weight.grad for gate in gates]))
    (aux, loads, grads), (other_aux, other_loads, other_grads) = results
    assert torch.equal(aux, other_aux)
    assert all(torch.equal(a, b) for a, b in zip(loads, other_loads, strict=True))
    assert all(error(a, b) < 1e-5 for a, b in zip(grads, other_grads, strict=True))
    # Of 9 and 6 tokens, the first depth has 8 and 5 that come before another one, the second 7 and 4.
    assert [int(load.sum()) // 3 for load in loads] == [15, 15, 13, 11]


def test_records_of_other_models():
    lm = model(config("v3"))
    ids = tokens(lm.config, 2, 9)
    record = lm(ids, record_routing=True).routing
    record.ids[2][0, 0, 0] = 8
    with pytest.raises(ValueError, match="experts between 0 and 7 for layer 2, got 8"):
        lm(ids, replay_routing=record)
    with pytest.raises(ValueError, match="at least one layer"):
        _ = RoutingRecord({}).shape
