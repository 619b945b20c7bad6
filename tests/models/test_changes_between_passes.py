"""Decisions about a model do not outlive its changes: hooks, patches, wrappers, casts.

A model that has run is changed and compared, bit by bit, with a copy that is changed before its first pass.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import deepseek_arch as da
from deepseek_arch.quant.fp8_convert import fp8_layers
from deepseek_kernels import BackendError, dispatch, use_backend
from support.small_models import config, model, tokens

# Children that a block may go around, and others that it calls.
CHILDREN = [
    "model.layers.0.input_layernorm",
    "model.layers.1.post_attention_layernorm",
    "model.layers.0.self_attn",
    "model.layers.0.self_attn.q_a_layernorm",
    "model.layers.0.self_attn.q_b_proj",
    "model.layers.0.self_attn.kv_a_layernorm",
    "model.layers.0.self_attn.kv_b_proj",
    "model.layers.0.mlp",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.experts",
    "model.layers.1.mlp.shared_experts",
    "lm_head",
]


def fp8(lm):
    """`lm` with FP8 layers whose products are of FP8 with FP8, so that norms quantize."""
    da.keep_fp8(lm)
    for layer in fp8_layers(lm).values():
        layer.activations = "fp8"
    return lm


def run(lm, grad=False, dtype=None):
    """Logits of a prompt, of a step on its cache, and of the same tokens without a cache."""
    ids = tokens(lm.config, 2, 6)
    autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with torch.set_grad_enabled(grad), autocast:
        cache = lm.new_cache(2)
        parts = [lm(ids[:, :4], cache=cache), lm(ids[:, 4:5], cache=cache), lm(ids)]
    return torch.cat([part.logits.float() for part in parts], dim=1)


def doubled(out):
    if isinstance(out, tuple):  # a router's: its weights
        logits, weights, ids = out
        return logits, 2 * weights, ids
    return 2 * out


def hooked(lm, name):
    lm.get_submodule(name).register_forward_hook(lambda module, args, out: doubled(out))


def patched(lm, name):
    module = lm.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))


class Doubled(nn.Module):
    """Another module in the place of one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return doubled(self.inner(*args, **kwargs))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def replaced(lm, name):
    parent, _, child = name.rpartition(".")
    setattr(lm.get_submodule(parent), child, Doubled(lm.get_submodule(name)))


def compare(used, change):
    """Runs `used`, changes it, and compares with a copy that was changed first; both are returned."""
    fresh = copy.deepcopy(used)
    before = run(used)
    assert torch.equal(run(used), before)
    change(used)
    change(fresh)
    expected = run(fresh)
    assert torch.equal(run(used), expected)
    assert not torch.equal(before, expected)
    return used, fresh


@pytest.mark.parametrize("kind", ["high precision", "FP8"])
@pytest.mark.parametrize("change", [hooked, patched, replaced])
@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_changed_after_the_first_pass(name, change, kind):
    lm = model(config("v3"))
    compare(fp8(lm) if kind == "FP8" else lm, lambda lm: change(lm, name))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.kv_b_proj", "model.layers.0.self_attn.kv_a_layernorm"])
def test_a_removed_hook_leaves_no_trace(name):
    lm = model(config("v3"))
    before = run(lm)
    handle = lm.get_submodule(name).register_forward_hook(lambda module, args, out: doubled(out))
    assert not torch.equal(run(lm), before)
    handle.remove()
    assert torch.equal(run(lm), before)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: doubled(out) if module is lm.get_submodule(name) else None
    )
    try:
        assert not torch.equal(run(lm), before)
    finally:
        hook.remove()
    assert torch.equal(run(lm), before)


def adapted(lm):
    """Adapters on every projection, and another copy of two norms."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2,
        target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        modules_to_save=["input_layernorm", "kv_a_layernorm"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    peft.inject_adapter_in_model(settings, lm)
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def test_adapters_after_the_first_pass():
    compare(model(config("v3")), adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["high precision", "FP8"])
def test_a_cast_after_the_first_pass(dtype, kind):
    lm = model(config("v3"))
    compare(fp8(lm) if kind == "FP8" else lm, lambda lm: lm.to(dtype))


def test_a_conversion_to_fp8_and_back_after_the_first_pass():
    used, fresh = compare(model(config("v3")), fp8)
    for lm in (used, fresh):
        da.dequantize(lm)
    assert torch.equal(run(used), run(fresh))


def test_fp8_products_switched_after_the_first_pass():
    def switch(lm):
        for layer in fp8_layers(lm).values():
            layer.activations = "high"

    compare(fp8(model(config("v3"))), switch)


@pytest.mark.parametrize("kind", ["high precision", "FP8"])
def test_autocast_and_gradients_come_and_go(kind):
    lm = model(config("v3"))
    lm = fp8(lm) if kind == "FP8" else lm
    fresh = copy.deepcopy(lm)
    before = run(lm)
    narrow, recorded = run(lm, dtype=torch.bfloat16), run(lm, grad=True)
    assert torch.equal(narrow, run(copy.deepcopy(fresh), dtype=torch.bfloat16)) and not torch.equal(narrow, before)
    assert recorded.requires_grad and torch.equal(recorded, run(copy.deepcopy(fresh), grad=True))
    assert torch.equal(run(lm), before)
    recorded.sum().backward()
    run(fresh, grad=True).sum().backward()
    for (name, mine), theirs in zip(lm.named_parameters(), fresh.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


def test_a_backend_asked_for_by_name_after_the_first_pass(monkeypatch):
    """The implementation is looked up once for each backend, not once for all."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    lm = model(config("v3"))
    before = run(lm)
    with use_backend("triton"), pytest.raises(BackendError):
        run(lm)
    assert torch.equal(run(lm), before)
    monkeypatch.undo()
    dispatch.forget()
