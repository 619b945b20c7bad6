"""FP8 training's policies, its report, what it refuses, and the sensitivity report."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import Tensor, nn

from deepseek_arch.layers.linear import Linear
from deepseek_arch.models.causal_lm import DeepseekLM
from deepseek_arch.moe.moe import Router
from deepseek_arch.quant.fp8_training import (
    FP8,
    HIGH,
    V3_RECIPE,
    FP8Policy,
    FP8Precision,
    FP8Rule,
    fp8_sensitivity,
    fp8_training,
    remove_fp8_training,
)
from support.fp8_layers import SMALL
from support.small_models import config, model, tokens


def policy(*patterns: str, precision: FP8Precision = FP8) -> FP8Policy:
    return FP8Policy(tuple(FP8Rule(pattern, precision) for pattern in patterns))


# ------------------------------------------------------------------ policies


def test_the_first_rule_that_matches_decides_and_what_none_matches_stays_high():
    some = FP8Policy((FP8Rule("layers.1.*", HIGH), FP8Rule("*.o_proj", FP8), FP8Rule("experts.*", FP8)))
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
    names += ["model.layers.11.mlp.experts.down_proj", "model.layers.11.mlp.shared_experts.down_proj"]
    rules = some.assign(names)
    assert [None if rule is None else rule.pattern for rule in rules.values()] == [
        "*.o_proj",
        "layers.1.*",
        None,
        "experts.*",
        None,  # a pattern matches from a dot on: shared_experts are no experts
    ]


@pytest.mark.parametrize("some", [V3_RECIPE, FP8Policy(()), policy("*", precision=FP8Precision(wgrad="high"))])
def test_a_policy_survives_json(some):
    assert FP8Policy.from_dict(json.loads(json.dumps(some.to_dict()))) == some


def test_a_policy_in_a_file_says_only_what_differs():
    some = FP8Policy.from_dict({"rules": [{"pattern": "o_proj", "precision": {"input_scale": "ue8m0"}}]})
    assert some == policy("o_proj", precision=FP8Precision(input_scale="ue8m0"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rule": []}, "expected a policy with keys"),
        ([], "expected a policy with keys"),
        ({"rules": [{"pattern": "*"}]}, "expected a rule with keys"),
        ({"rules": [{"pattern": "*", "precision": {"fprob": "fp8"}}]}, "expected a precision with keys .*'fprob'"),
        ({"rules": [{"pattern": "*", "precision": {"dgrad": "bf16"}}]}, "expected dgrad 'fp8' or 'high', got 'bf16'"),
        ({"rules": [{"pattern": "*", "precision": {"grad_scale": "e8"}}]}, "expected grad_scale None or 'ue8m0'"),
    ],
)
def test_a_policy_in_a_file_is_checked(data, message):
    with pytest.raises(ValueError, match=message):
        FP8Policy.from_dict(data)


# ------------------------------------------------------------------ what gets what


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite", "kimi", "moonlight", "glm"])
def test_the_v3_recipe_leaves_out_what_the_paper_leaves_out(kind):
    """TRAPS E7: everything that is multiplied is in FP8 but routers, embedding, head and eh_proj."""
    lm = DeepseekLM(config(kind, num_nextn_predict_layers=1), device="meta")
    report = fp8_training(lm)
    high = {row.name for row in report.rows if row.precision.is_high}
    assert high == {"lm_head", "mtp.0.eh_proj"}
    matrices = {name.removesuffix(".weight") for name, p in lm.named_parameters() if p.ndim > 1}
    routers = {name for name, module in lm.named_modules() if isinstance(module, Router)}
    assert set(report.fp8) == matrices - high - routers - {"model.embed_tokens"}
    scales = {(r.precision.input_scale, r.precision.grad_scale): set() for r in report.rows}
    for row in report.rows:
        scales[row.precision.input_scale, row.precision.grad_scale].add(".".join(row.name.split(".")[-2:]))
    assert scales.pop(("ue8m0", None)) == {"self_attn.o_proj", "experts.gate_up_proj"}
    assert scales.pop((None, "ue8m0")) == {"experts.down_proj"}
    assert set(scales) == {(None, None)}


def test_the_report_is_a_table_with_one_line_for_all_layers():
    lm = DeepseekLM(SMALL.replace(num_hidden_layers=3), device="meta")
    text = str(fp8_training(lm)).splitlines()
    assert text[0].split()[:5] == ["weight", "shape", "fprop", "dgrad", "wgrad"]
    assert text[0].split()[-2:] == ["rule", "count"]
    (line,) = (line.split() for line in text if line.startswith("model.layers.*.mlp.experts.down_proj"))
    assert line[1:] == ["4x32x20", "fp8", "fp8", "fp8", "float32", "ue8m0", "experts.down_proj", "2"]
    (line,) = (line.split() for line in text if line.startswith("lm_head"))
    assert line[1:] == ["61x32", "high", "high", "high", "-", "-", "lm_head", "1"]
    assert len(text) == 1 + len({re.sub(r"\d+", "*", row.name) for row in fp8_training(lm).rows})


def test_a_part_of_a_model_and_a_lone_layer():
    lm = DeepseekLM(SMALL, device="meta")
    assert fp8_training(lm.model.layers[1].mlp).fp8 == (
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
    )
    plain = nn.Linear(4, 3)  # torch's own
    assert fp8_training(plain, policy("*")).fp8 == ("",)
    assert "FP8TrainingLinear" in repr(plain) and "fprop+dgrad+wgrad" in repr(plain)
    remove_fp8_training(plain)
    assert type(plain) is nn.Linear


def test_half_of_the_experts_products():
    """`gate_up_proj` and `down_proj` are two weights with a rule each; the other one stays as exact as it was."""
    lm, ids = model(SMALL), tokens(SMALL, 2, 9)
    exact = lm(ids).logits
    errors = []
    for names in (["experts.gate_up_proj"], ["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]):
        fp8_training(lm, policy(*names))
        out = lm(ids, labels=ids)
        out.loss.backward()
        errors.append(float((out.logits - exact).detach().norm()))
    assert all(errors) and len(set(errors)) == 3
    assert all(p.grad is not None for name, p in lm.named_parameters() if "experts" in name and "mtp" not in name)


# ------------------------------------------------------------------ what is refused, before anything changes


class Parametrized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrized() -> nn.Module:
    layer = Linear(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Parametrized())
    return layer


def hooked() -> nn.Module:
    layer = Linear(4, 3)
    layer.forward = layer.forward  # as device hooks do
    return layer


def stored_in_fp8() -> nn.Module:
    layer = Linear(4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


REFUSED = {
    "nothing matches": (lambda: Linear(4, 3), policy("q_proj"), r"expected rule 'q_proj' to match something"),
    "no linear layer": (lambda: nn.LayerNorm(4), policy("*"), "got no match among 0 linear"),
    "nothing in the recipe": (
        lambda: nn.ModuleDict({"head": Linear(4, 3)}),
        V3_RECIPE,
        r"'o_proj'.* such as \['head'\]",
    ),
    "another class": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 3),
        policy("*"),
        "expected torch.nn",
    ),
    "parametrized": (parametrized, policy("*"), "expected torch.nn.Linear, deepseek_arch.Linear or Experts"),
    "another forward": (hooked, policy("*"), "to have the forward of its class"),
    "float64": (lambda: Linear(4, 3, dtype=torch.float64), policy("*"), "expected master weights .* got torch.float64"),
    "stored in FP8": (stored_in_fp8, policy("*"), r'got torch.float8_e4m3fn .*fp8="dequantize"'),
    "no experts": (
        lambda: Linear(4, 3),
        policy("*", precision=FP8Precision(swiglu_cache="fp8")),
        "swiglu_cache='fp8' for down_proj of experts only",
    ),
}


@pytest.mark.parametrize(("make", "some", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused_before_anything_changes(make, some, message):
    whole = nn.Sequential(Linear(4, 4), make()) if message.startswith("expected torch") else make()
    before = [type(module) for module in whole.modules()]
    with pytest.raises(ValueError, match=message):
        fp8_training(whole, some)
    assert [type(module) for module in whole.modules()] == before


@pytest.mark.parametrize("over", ["parametrization", "forward"])
def test_what_was_put_over_a_module_has_to_go_first(over):
    whole = nn.Sequential(Linear(4, 4), Linear(4, 4))
    fp8_training(whole, policy("*"))
    x = torch.randn(2, 4)
    expected = whole(x)
    if over == "forward":
        whole[1].forward = whole[1].forward
    else:
        nn.utils.parametrize.register_parametrization(whole[1], "weight", Parametrized())
        half = whole[1].parametrizations.weight.original.detach()
        with torch.no_grad():
            half.div_(2)
        whole(x).sum().backward()  # what is computed is multiplied, and no parameter: nothing to keep codes of
    assert torch.equal(whole(x), expected)
    for change in (lambda: remove_fp8_training(whole), lambda: fp8_training(whole, policy("0"))):
        with pytest.raises(ValueError, match="as fp8_training left it"):
            change()
    assert torch.equal(whole(x), expected)
    if over == "forward":
        del whole[1].forward
    else:
        nn.utils.parametrize.remove_parametrizations(whole[1], "weight")
    remove_fp8_training(whole)
    assert [type(module) for module in whole] == [Linear, Linear]


def test_a_rule_that_no_other_rule_leaves_anything_to_is_no_error():
    """Only one that matches nothing at all is: exceptions may stand before the rule."""
    layer = Linear(4, 3)
    assert fp8_training(layer, policy("*").keeping_high([""])).fp8 == ()
    assert type(layer) is Linear


# ------------------------------------------------------------------ sensitivity


def planted(lm: nn.Module, name: str) -> nn.Module:
    """A weight of 10^8 in a block of small ones, for a feature that is always zero: nothing changes in high precision,
    and in FP8 the block's other codes become zeros."""
    mlp = lm.get_submodule(name)
    with torch.no_grad():
        mlp.gate_proj.weight[0] = 0
        mlp.down_proj.weight[0, 0] = 1e8
    return lm


BAD = "model.layers.0.mlp"


def test_the_sensitivity_report_finds_a_planted_layer_and_helps_to_leave_it_out():
    lm, batches = planted(model(SMALL), BAD), [tokens(SMALL, 2, 9, seed=seed) for seed in range(2)]
    found = fp8_sensitivity(lm, batches)
    assert found.rows[0].name == f"{BAD}.down_proj" and found.rows[0].weights == (f"{BAD}.down_proj",)
    assert [row.error for row in found.rows] == sorted((row.error for row in found.rows), reverse=True)
    assert {row.name for row in found.rows} == set(fp8_training(model(SMALL)).fp8)
    assert all(abs(row.change) <= row.error for row in found.rows)
    assert len(str(found).splitlines()) == 1 + len(found.rows) and f"{BAD}.down_proj" in str(found).splitlines()[1]

    with torch.no_grad():
        losses = [float(lm(ids, labels=ids).loss + 0.3 * lm(ids, labels=ids).mtp_loss) for ids in batches]
    assert found.base == pytest.approx(sum(losses) / 2, rel=1e-6)
    better = found.keeping_high(worst=1)
    threshold = (found.rows[0].error + found.rows[1].error) / 2 / found.base
    assert found.keeping_high(above=threshold) == better and found.keeping_high(worst=0) == V3_RECIPE
    everything = set(fp8_training(lm).fp8)
    assert everything - set(fp8_training(lm, better).fp8) == {f"{BAD}.down_proj"}


def test_the_error_of_a_row_is_what_that_layer_alone_changes():
    lm, ids = model(SMALL), tokens(SMALL, 2, 9)
    found = {row.name: row for row in fp8_sensitivity(lm, [ids], by="layer").rows}
    assert set(found) == {"model.layers.0", "model.layers.1", "mtp.0"}
    with torch.no_grad():
        losses = []
        for some in (None, policy("model.layers.1.*", precision=FP8)):
            if some:
                rules = V3_RECIPE.assign(fp8_training(lm).fp8)
                mine = {name: rule for name, rule in rules.items() if name.startswith("model.layers.1.")}
                fp8_training(lm, FP8Policy(tuple(FP8Rule(name, rule.precision) for name, rule in mine.items())))
            out = lm(ids, labels=ids)
            losses.append(float(out.loss + 0.3 * out.mtp_loss))
    assert set(found["model.layers.1"].weights) == set(mine)
    assert found["model.layers.1"].change == pytest.approx(losses[1] - losses[0], abs=1e-6)


@pytest.mark.parametrize("before", [None, V3_RECIPE], ids=["high precision", "FP8"])
def test_the_model_comes_back_as_it_was(before):
    lm, ids = model(SMALL).train(), tokens(SMALL, 2, 9)
    lm.model.layers[0].eval()
    if before:
        fp8_training(lm, before)
    lm(ids, labels=ids).loss.backward()
    calls = []
    lm.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: calls.append(1))

    modules = [(m, type(m), m.training, dict(m._forward_hooks)) for m in lm.modules()]
    precisions = [getattr(m, "fp8_precision", None) for m in lm.modules()]
    weights = [(p, p.data_ptr(), p._version, p.grad) for p in lm.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in lm.parameters()]
    random, expected = torch.get_rng_state(), lm(ids, labels=ids).loss
    found = fp8_sensitivity(
        lm, [ids], policy("o_proj"), loss=lambda m, b: m(b, labels=b).loss + torch.rand(()), gradients=True
    )
    assert len(found.rows) == 3 and calls
    assert [(m, type(m), m.training, dict(m._forward_hooks)) for m in lm.modules()] == modules
    assert [getattr(m, "fp8_precision", None) for m in lm.modules()] == precisions
    for p, (other, address, version, grad), value in zip(lm.parameters(), weights, gradients, strict=True):
        assert p is other and (p.data_ptr(), p._version) == (address, version) and p.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(lm(ids, labels=ids).loss, expected)


def test_an_error_in_the_loss_leaves_no_trace_either():
    lm = model(SMALL).train()
    types = [type(m) for m in lm.modules()]

    def fails(one: nn.Module, batch: Tensor) -> Tensor:
        if any("FP8" in type(m).__name__ for m in one.modules()):
            raise KeyError("mine")
        return batch.float().sum()

    with pytest.raises(KeyError, match="mine"):
        fp8_sensitivity(lm, [tokens(SMALL, 1, 5)], loss=fails)
    assert [type(m) for m in lm.modules()] == types and all(m.training for m in lm.modules())


def test_random_numbers_of_the_loss_do_not_count():
    found = fp8_sensitivity(model(SMALL), [tokens(SMALL, 1, 5)], policy("o_proj"), loss=lambda m, b: torch.rand(()))
    assert all(row.error == 0 for row in found.rows)


def test_gradient_errors_are_relative_to_all_gradients():
    lm, ids = planted(model(SMALL), BAD), tokens(SMALL, 2, 9)
    assert all(row.gradient_error is None for row in fp8_sensitivity(lm, [ids], policy("o_proj")).rows)
    names = [f"{BAD}.down_proj", "mtp.0.mlp.experts.down_proj"]
    found = {row.name: row.gradient_error for row in fp8_sensitivity(lm, [ids], policy(*names), gradients=True).rows}

    def gradients() -> Tensor:
        lm.zero_grad()
        out = lm(ids, labels=ids)
        (out.loss + 0.3 * out.mtp_loss).backward()
        return torch.cat([p.grad.flatten().double() for p in lm.parameters()])

    exact = gradients()
    for name in names:
        fp8_training(lm, policy(name))
        assert found[name] == pytest.approx(float((gradients() - exact).norm() / exact.norm()), rel=1e-4)
    assert found[names[0]] > found[names[1]] > 0


def test_a_loss_that_becomes_not_a_number_is_the_worst():
    lm, ids = model(SMALL), tokens(SMALL, 1, 5)

    def loss(one: nn.Module, batch: Tensor) -> Tensor:
        value = one(batch, labels=batch).loss
        return value * math.nan if "FP8" in type(one.model.layers[1].self_attn.o_proj).__name__ else value

    found = fp8_sensitivity(lm, [ids], policy("o_proj"), loss=loss)
    assert found.rows[0].name == "model.layers.1.self_attn.o_proj" and math.isnan(found.rows[0].error)
    assert found.keeping_high(above=0.5) == found.keeping_high(worst=1)


def test_what_a_sensitivity_report_cannot_be_made_of():
    lm, ids = model(SMALL), tokens(SMALL, 1, 5)
    cases = {
        "at least one batch": lambda: fp8_sensitivity(lm, []),
        "expected by": lambda: fp8_sensitivity(lm, [ids], by="module"),
        "finite losses": lambda: fp8_sensitivity(lm, [ids], loss=lambda m, b: torch.tensor(math.nan)),
        "batches with labels": lambda: fp8_sensitivity(lm, [{"input_ids": ids}]),
        "expected rule 'nothing'": lambda: fp8_sensitivity(lm, [ids], policy("nothing")),
        "either worst or above": lambda: fp8_sensitivity(lm, [ids], policy("o_proj")).keeping_high(),
        "not negative": lambda: fp8_sensitivity(lm, [ids], policy("o_proj")).keeping_high(worst=-1),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_rules_and_names_that_are_none():
    for rules in ((1,), ("o_proj",), (None,)):
        with pytest.raises(ValueError, match="expected rules to be FP8Rules, got"):
            FP8Policy(rules)
    for names in (range(10**12), ["a", 1], [None]):  # the first is not listed
        with pytest.raises(ValueError, match=r"expected names of weights, got (0|1|None) among"):
            V3_RECIPE.assign(names)
