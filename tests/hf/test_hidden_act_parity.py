"""Every `hidden_act` that transformers' own classes take, against them: logits, gradients and generated tokens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN
from twins import native, ours

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.config.validation import HIDDEN_ACTS
from support import small_models
from support.small_models import error, tokens

TOLERANCE = 1e-4


def test_only_activations_with_parameters_are_left_out():
    for name in set(ACT2CLS) - set(HIDDEN_ACTS):
        assert list(ACT2FN[name].parameters()), f"{name} has no parameters, and is taken by the natives"
        config = dhf.ArchDeepseekV3Config(hidden_act=name)
        with pytest.raises(da.ConfigError, match=f"expected hidden_act to be one of silu.*got '{name}'"):
            config.to_core()


@pytest.mark.parametrize("name", sorted(set(ACT2CLS) & set(HIDDEN_ACTS)))
def test_logits_and_gradients_equal_the_natives(name):
    config = small_models.config("v3", hidden_act=name)
    model = ours(config)
    twin = native(model)
    assert twin.config.hidden_act == name
    ids = tokens(config, 2, 9)
    for each in (model, twin):
        each.train()(ids, labels=ids).loss.backward()
    gradients = {key: p.grad for key, p in twin.named_parameters()}
    assert all(error(p.grad, gradients[key]) < 1e-3 for key, p in model.named_parameters() if p.grad is not None)
    model.eval(), twin.eval()
    with torch.no_grad():
        assert error(model(ids).logits, twin(ids).logits) < TOLERANCE
        plain = ours(small_models.config("v3"))(ids).logits
        assert (error(plain, twin(ids).logits) > 1e-3) == (name not in ("silu", "swish"))


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_each_family_generates_and_saves_it(kind, tmp_path):
    config = small_models.config(kind, hidden_act="gelu_pytorch_tanh")
    model, ids = ours(config), tokens(config, 2, 7)
    twin = native(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = twin.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"
    assert torch.equal(dhf.DeepseekForCausalLM.from_pretrained(tmp_path).generate(ids, **settings), expected)
    with torch.no_grad():
        assert error(da.load(tmp_path)(ids).logits, twin(ids).logits) < TOLERANCE
