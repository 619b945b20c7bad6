"""Routers inside adapters and other wrappers: training counts, balances, records and replays as without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepseek_arch as da
from deepseek_arch.moe.load_balancer import expert_loads
from deepseek_arch.moe.moe import MoE
from support.small_models import config, model, tokens

peft = pytest.importorskip("peft")

RATE = 0.5  # enough for one step to change the routing


class Wrapper(nn.Module):
    """A module around another, without its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def generic(lm):
    for layer in (*lm.model.layers, *lm.mtp):
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate = Wrapper(layer.mlp.gate)


def lora_on_the_weight(lm):
    settings = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    peft.inject_adapter_in_model(settings, lm)


def saved_copies(lm):
    settings = peft.LoraConfig(r=2, target_modules=["q_a_proj"], modules_to_save=["gate"])
    return peft.PeftModel(lm, settings)  # copies the gates


WRAPPERS = {"a module": generic, "LoRA on the weight": lora_on_the_weight, "modules_to_save": saved_copies}


def step(lm, balancer, ids):
    """Counts of one training step, in the order of the layers, and its losses."""
    out = lm.train()(ids, labels=ids)
    (out.loss + out.mtp_loss).backward()
    report = balancer.step()
    return list(report.loads.values()), (out.loss.detach(), out.aux_loss.detach(), out.mtp_loss.detach())


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("first", ["balancer", "wrapper"])
def test_wrapped_routers_are_counted_and_balanced(wrap, first):
    plain = model(config("v3", num_nextn_predict_layers=1))
    wrapped = copy.deepcopy(plain)
    ids = tokens(plain.config, 2, 7)
    if first == "balancer":
        balancer = da.LoadBalancer(wrapped, RATE)
        wrap(wrapped)
    else:
        wrap(wrapped)
        balancer = da.LoadBalancer(wrapped, RATE)
    before = plain(ids).logits.detach()
    expected, losses = step(plain, da.LoadBalancer(plain, RATE), ids)
    got, wrapped_losses = step(wrapped, balancer, ids)
    assert len(got) == len(expected) == 3 and all(map(torch.equal, got, expected))
    assert all(map(torch.equal, wrapped_losses, losses))
    with torch.no_grad():
        after = plain.eval()(ids).logits
        assert not torch.equal(after, before) and torch.equal(wrapped.eval()(ids).logits, after)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_wrapped_routers_record_and_replay(wrap):
    plain = model(config("v3"))
    wrapped = copy.deepcopy(plain)
    wrap(wrapped)
    ids = tokens(plain.config, 2, 7)
    record = plain(ids, record_routing=True).routing
    own = wrapped(ids, record_routing=True)
    for layer, chosen in record.ids.items():
        assert torch.equal(own.routing.ids[layer], chosen)
        assert torch.equal(own.routing.margins[layer], record.margins[layer])
    other = {layer: (chosen + 1) % plain.config.n_routed_experts for layer, chosen in record.ids.items()}
    replayed = da.RoutingRecord(other)
    assert torch.equal(wrapped(ids, replay_routing=replayed).logits, plain(ids, replay_routing=replayed).logits)


def test_expert_loads_are_found_behind_wrappers():
    lm = model(config("v3"))
    generic(lm)
    ids = tokens(lm.config, 1, 5)
    lm.train()(ids, labels=ids)
    loads = expert_loads(lm)
    assert len(loads) == 2 and all(load.sum() == 5 * lm.config.num_experts_per_tok for load in loads.values())


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, -1e-9])
def test_a_rate_that_is_not_finite_or_negative_changes_nothing(rate):
    lm = model(config("v3"))
    with pytest.raises(
        ValueError, match=r"expected (a finite rate >= 0|rate to be a finite number or a function), got"
    ):
        da.LoadBalancer(lm, rate)
    balancer = da.LoadBalancer(lm, lambda step: rate)
    ids = tokens(lm.config, 1, 5)
    lm.train()(ids, labels=ids)
    before = [router.e_score_correction_bias.clone() for router in balancer.routers.values()]
    with pytest.raises(ValueError, match="expected a finite rate >= 0, got"):
        balancer.step()
    after = [router.e_score_correction_bias for router in balancer.routers.values()]
    assert all(map(torch.equal, before, after)) and balancer.steps == 0 and len(expert_loads(lm)) == 2
