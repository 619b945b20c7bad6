"""Norms that quantize for the FP8 layers behind them: the same bits as quantizing in each layer, with fewer passes."""

import pytest
import torch

from deepseek_arch import DeepseekLM, fp8_activations, keep_fp8
from deepseek_arch.fp8_linear import fp8_layers
from small_models import config


@pytest.fixture
def model():
    """A dense layer and two with experts, all products of FP8 with FP8."""
    cfg = config("v3", num_hidden_layers=3, first_k_dense_replace=1)
    model = keep_fp8(DeepseekLM(cfg).eval(), parameters=[n for n, p in DeepseekLM(cfg).named_parameters() if _fp8(n)])
    for layer in fp8_layers(model).values():
        layer.activations = "fp8"
    return model


def _fp8(name):
    return name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused norms that were called."""
    made = []
    for name in ("rms_norm_quantize", "add_rms_norm_quantize"):
        real = getattr(fp8_activations, name)
        monkeypatch.setattr(
            fp8_activations, name, lambda *args, name=name, real=real: (made.append(name), real(*args))[1]
        )
    return made


@pytest.mark.parametrize("format", [None, "ue8m0"])
@torch.no_grad()
def test_one_quantization_serves_all_layers_behind_a_norm(model, calls, format, monkeypatch):
    for layer in fp8_layers(model).values():
        layer.scale_format = format
    ids = torch.randint(0, model.config.vocab_size, (2, 7))
    fused = model(ids).logits
    # Of each layer the input norm and the query latent's; of the dense one the norm before its MLP.
    assert sorted(calls) == ["add_rms_norm_quantize"] + ["rms_norm_quantize"] * 6
    monkeypatch.setattr(fp8_activations, "_quantized", lambda *_: False)
    assert torch.equal(model(ids).logits, fused)


def _hook_a_layer(model):
    for layer in model.model.layers:
        for name in ("q_a_proj", "q_b_proj"):
            getattr(layer.self_attn, name).register_forward_hook(lambda *_: None)


def _other_format(model):
    for layer in model.model.layers:
        layer.self_attn.q_a_proj.scale_format = layer.mlp.gate_proj.scale_format = "ue8m0"
        layer.self_attn.q_b_proj.activations = "high"


@pytest.mark.parametrize("change", [_hook_a_layer, _other_format])
@torch.no_grad()
def test_a_norm_stays_one_where_something_else_hears_of_it_or_layers_differ(model, calls, change):
    model.model.layers = model.model.layers[:1]
    change(model)
    if change is _hook_a_layer:
        model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert calls == []


def test_gradients_need_the_norm_itself(model, calls):
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert calls == []
    assert model.model.layers[0].input_layernorm.weight.grad.isfinite().all()
