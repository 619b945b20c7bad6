"""Norms that quantize for the FP8 layers behind them: the same bits as quantizing in each layer, with fewer passes."""

import pytest
import torch

from deepseek_arch import DeepseekLM, keep_fp8
from deepseek_arch.layers import norm as norms
from deepseek_arch.layers.linear import MLP
from deepseek_arch.quant.fp8_convert import fp8_layers
from support.small_models import config, error


@pytest.fixture
def model():
    """A dense layer and two with experts, all products of FP8 with FP8."""
    cfg = config("v3", num_hidden_layers=3, first_k_dense_replace=1)
    model = keep_fp8(DeepseekLM(cfg).eval())
    for layer in fp8_layers(model).values():
        layer.activations = "fp8"
    return model


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused norms that were called."""
    made = []
    for name in ("rms_norm_quantize", "add_rms_norm_quantize"):
        real = getattr(norms, name)
        monkeypatch.setattr(norms, name, lambda *args, name=name, real=real: (made.append(name), real(*args))[1])
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
    monkeypatch.setattr(norms, "_may_quantize", lambda *_: False)
    assert torch.equal(model(ids).logits, fused)


def _patched(module):
    """A forward of its own on the instance, which does the same; it wants a tensor."""
    real = module.forward
    module.forward = lambda x, *rest: real(x * 1.0, *rest)


class _OwnMLP(MLP):
    def forward(self, x):
        return super().forward(x * 1.0)


def _readers(layer):
    """Those that read an input norm, the query latent's norm, and the norm before the MLP."""
    return layer.self_attn.q_a_proj, layer.self_attn.q_b_proj, layer.mlp.gate_proj


def _hook_projections(layer):
    for one in _readers(layer):
        one.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))


def _patch_projections(layer):
    for one in _readers(layer):
        _patched(one)


def _hook_blocks(layer):
    layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    layer.self_attn.register_forward_pre_hook(lambda module, args: (args[0] * 1.0, *args[1:]))
    layer.self_attn.q_b_proj.register_forward_hook(lambda *_: None)


def _other_class(layer):
    layer.mlp.__class__ = _OwnMLP
    _patched(layer.self_attn)
    _patched(layer.self_attn.q_b_proj)


@pytest.mark.parametrize("change", [_hook_projections, _patch_projections, _hook_blocks, _other_class])
@torch.no_grad()
def test_nobody_gets_codes_who_does_not_know_them(model, calls, change):
    model.model.layers = model.model.layers[:1]
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    calls.clear()
    change(model.model.layers[0])
    assert torch.equal(model(ids).logits, expected)
    assert calls == []


@torch.no_grad()
def test_layers_of_different_formats_quantize_for_themselves(model, calls):
    model.model.layers = model.model.layers[:1]
    for one in _readers(model.model.layers[0])[::2]:
        one.scale_format = "ue8m0"
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert calls == ["rms_norm_quantize"]  # of the query latent, which one layer reads


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm", "self_attn.kv_a_layernorm"])
@torch.no_grad()
def test_a_norm_that_does_something_else_is_called(norm):
    """Hooked, patched or of another class: with the cache and without, as it was always called."""
    model = DeepseekLM(config("v3")).eval()
    ids, layer = torch.tensor([[1, 2, 3]]), model.model.layers[0]
    before, module, seen = model(ids).logits, layer.get_submodule(norm), []

    def hook(_, args, out):
        seen.append((len(args), type(out)))
        return 2 * out

    handle = module.register_forward_hook(hook)
    doubled = model(ids).logits
    assert seen == [(1, torch.Tensor)] and not torch.allclose(doubled, before)
    assert error(model(ids, cache=model.new_cache(1)).logits, doubled) < 1e-5
    handle.remove()
    real = module.forward
    module.forward = lambda x: 2 * real(x)
    assert torch.equal(model(ids).logits, doubled)
    assert error(model(ids, cache=model.new_cache(1)).logits, doubled) < 1e-5
    owner, _, name = norm.rpartition(".")
    other = torch.nn.RMSNorm(len(module.weight), eps=module.eps)
    setattr(layer.get_submodule(owner), name, other)
    assert error(model(ids, cache=model.new_cache(1)).logits, before) < 1e-5


@torch.no_grad()
def test_what_a_hook_keeps_stays_as_it_was(model):
    kept = []
    model.model.layers[0].self_attn.q_b_proj.register_forward_hook(lambda _, args, out: kept.extend((out, out.clone())))
    model(torch.tensor([[1, 2, 3]]))
    assert torch.equal(*kept)


def test_gradients_need_the_norm_itself(model, calls):
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert calls == []
    assert model.model.layers[0].input_layernorm.weight.grad.isfinite().all()
