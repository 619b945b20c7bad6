"""Every child of a model in every wrapper that users put around it: the same loss, gradients, counts and tokens.

A wrapper has none of its child's attributes, and what it adds is lost where its forward is reached around.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import ours

import deepseek_arch as da
from deepseek_arch.moe.load_balancer import routers
from deepseek_arch.moe.moe import Router
from support import small_models
from support.small_models import error, tokens

CONFIG = small_models.config("v3", num_nextn_predict_layers=1)
TOLERANCE = 2e-5
IDS = tokens(CONFIG, 2, 9)
CHILDREN = [
    *(f"layers.1.self_attn.{name}_proj" for name in ("q_a", "q_b", "kv_b", "o")),
    "layers.1.self_attn.kv_a_proj_with_mqa",
    "layers.1.self_attn.q_a_layernorm",
    "layers.1.self_attn.kv_a_layernorm",
    "layers.1.self_attn",
    "layers.0.mlp",
    "layers.0.mlp.up_proj",
    "layers.1.mlp",
    "layers.1.mlp.gate",
    "layers.1.mlp.experts",
    "layers.1.mlp.shared_experts",
    "layers.1.mlp.shared_experts.down_proj",
    "layers.1.input_layernorm",
    "layers.1.post_attention_layernorm",
    "layers.1",
    "norm",
    "embed_tokens",
    "lm_head",
    "mtp.0",
    "mtp.0.eh_proj",
    "mtp.0.shared_head",
    "mtp.0.mlp",
    "mtp.0.mlp.gate",
]


class Opaque(nn.Module):
    """A module around another one, with none of its attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


def opaque(model: nn.Module, name: str) -> Callable[[], int]:
    wrapper = Opaque(model.get_submodule(name))
    model.set_submodule(name, wrapper)
    return lambda: wrapper.calls


def hooked(model: nn.Module, name: str) -> Callable[[], int]:
    calls: list[str] = []
    child = model.get_submodule(name)
    child.register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True)
    child.register_forward_hook(lambda module, args, output: calls.append("post"))
    return lambda: calls.count("pre") if calls.count("pre") == calls.count("post") else 0


def offloaded(model: nn.Module, name: str) -> Callable[[], int]:
    """Its parameters are on the meta device except while it runs."""
    accelerate = pytest.importorskip("accelerate")
    calls: list[str] = []

    class Counted(accelerate.hooks.AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append("")
            return super().pre_forward(module, *args, **kwargs)

    child = model.get_submodule(name)
    kept = {key: tensor.clone() for key, tensor in child.state_dict().items()}
    hook = Counted("cpu", offload=True, offload_buffers=False, weights_map=kept, place_submodules=True)
    accelerate.hooks.add_hook_to_module(child, hook)
    return lambda: len(calls)


def saved_with_the_adapter(model: nn.Module, name: str) -> Callable[[], int]:
    other = pytest.importorskip("peft.utils.other")
    wrapper = other.ModulesToSaveWrapper(model.get_submodule(name), "default")
    wrapper.requires_grad_(True)
    model.set_submodule(name, wrapper)
    calls: list[str] = []
    wrapper.modules_to_save["default"].register_forward_pre_hook(lambda module, args: calls.append(""))
    return lambda: len(calls)


def core(_: str) -> Any:
    return small_models.model(CONFIG)


def hugging_face(_: str) -> Any:
    model = ours(CONFIG)
    model.config.mtp_loss_weight = 0.3
    return model


def path_in(model: Any, child: str) -> str:
    return child if child.startswith(("mtp", "lm_head")) else f"model.{child}"


def plain_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers add; of a copy that an adapter trains, the copy."""
    out = {}
    for name, tensor in named.items():
        if "original_module." not in name and tensor is not None:
            for added in ("inner.", "modules_to_save.default.", "_orig_mod."):
                name = name.replace(added, "")
            out[name] = tensor
    return out


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and moved biases of a step."""
    model.train()
    balancer = da.LoadBalancer(model, rate=0.25)
    out = model(IDS, labels=IDS)
    loss = out.loss if hasattr(model, "generate") else out.loss + 0.3 * out.mtp_loss
    loss.backward()
    balancer.step()
    gradients = plain_names({name: p.grad for name, p in model.named_parameters()})
    biases = {f"{name}.": router.e_score_correction_bias for name, router in routers(model).items()}
    return loss.detach(), gradients, plain_names(biases)


@torch.no_grad()
def decoded(model: Any, mtp: bool) -> Tensor:
    model.eval()
    if hasattr(model, "generate"):
        return model.generate(IDS, max_new_tokens=5, do_sample=False, use_mtp=mtp, pad_token_id=None)
    return da.generate(model, IDS, max_new_tokens=5, mtp_depth=int(mtp))


@pytest.fixture(scope="module", params=[core, hugging_face])
def reference(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    make = request.param
    return make, (trained(make("")), decoded(make(""), False))


@pytest.mark.parametrize("wrap", [opaque, hooked, offloaded, saved_with_the_adapter])
@pytest.mark.parametrize("child", CHILDREN)
def test_a_wrapped_child_trains_counts_and_decodes_as_before(reference, child, wrap):
    make, ((loss, gradients, biases), text) = reference
    model = make("")
    name = path_in(model, child)
    if wrap is not offloaded:  # gradients of parameters that come and go are accelerate's matter
        calls = wrap(model, name)
        got, grads, moved = trained(model)
        assert calls() > 0, "the wrapper was reached around in training"
        assert error(got, loss) <= TOLERANCE
        assert grads.keys() == gradients.keys()
        assert all(error(grads[key], gradients[key]) <= TOLERANCE for key in gradients)
        assert moved.keys() == biases.keys() and all(torch.equal(moved[key], biases[key]) for key in biases)
        assert any(not torch.equal(moved[f"{key}."], bias) for key, bias in _loaded_biases().items())
        model = make("")
    calls = wrap(model, name)
    assert torch.equal(decoded(model, child.startswith("mtp")), text)
    assert calls() > 0, "the wrapper was reached around in decoding"


def _loaded_biases() -> dict[str, Tensor]:
    return {name: router.e_score_correction_bias for name, router in routers(small_models.model(CONFIG)).items()}


@pytest.mark.parametrize("child", ["layers.1.self_attn.kv_b_proj", "layers.1.mlp.gate", "layers.1.mlp", "layers.1"])
def test_a_compiled_child_trains_counts_and_decodes_as_before(reference, child):
    make, ((loss, gradients, biases), text) = reference
    for mode in ("training", "decoding"):
        model = make("")
        name = path_in(model, child)
        model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
        if mode == "decoding":
            assert torch.equal(decoded(model, False), text)
            continue
        got, grads, moved = trained(model)
        assert error(got, loss) <= TOLERANCE
        assert all(error(grads[key], gradients[key]) <= TOLERANCE for key in gradients)
        assert moved.keys() == biases.keys() and all(torch.equal(moved[key], biases[key]) for key in biases)


ADAPTERS = {
    "all linear": {"target_modules": "all-linear"},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "trained copies": {"target_modules": ["o_proj"], "modules_to_save": ["gate", "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", ["v3", "v2-lite"])
@pytest.mark.parametrize("where", ADAPTERS)
def test_adapters_compute_what_the_merged_model_computes(where, kind):
    """In training mode, in evaluation and in cached decoding; the routers count alike."""
    peft = pytest.importorskip("peft")
    config = small_models.config(kind)
    settings = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **ADAPTERS[where])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(ours(config), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    merged = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)
    ids = tokens(config, 2, 9)
    losses, loads = [], []
    for model in (adapted, merged):
        model.train()
        balancer = da.LoadBalancer(model, rate=0.0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
        loads.append(list(balancer.step().loads.values()))
    assert error(losses[0], losses[1]) <= TOLERANCE
    assert len(loads[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*loads, strict=True))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    adapted.eval(), merged.eval()
    with torch.no_grad():
        assert error(adapted(input_ids=ids).logits, merged(input_ids=ids).logits) <= TOLERANCE
        settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        got, expected = (model.generate(input_ids=ids, **settings) for model in (adapted, merged))
    assert torch.equal(got.sequences, expected.sequences)
    assert all(error(a, b) <= TOLERANCE for a, b in zip(got.logits, expected.logits, strict=True))


def test_an_expansion_with_a_bias_decodes_as_the_whole_sequence():
    """An adapter's bias makes `kv_b_proj` affine; the absorbed form that decoding takes has to add it too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["kv_b_proj"], lora_bias=True, init_lora_weights=False)
    model = peft.get_peft_model(ours(CONFIG), settings).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter += torch.randn(parameter.shape)
        assert error(model(input_ids=IDS).logits, plain) > 0.05
        out = model.generate(input_ids=IDS, **options)
        whole = model(input_ids=out.sequences).logits
    assert all(error(step, whole[:, 8 + i]) <= TOLERANCE for i, step in enumerate(out.logits))


def test_rows_with_adapters_of_their_own_decode_as_with_that_adapter_alone():
    """PEFT's mixed batches: a row, an adapter (`adapter_names`)."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(ours(CONFIG), settings)
    model.add_adapter("other", settings)
    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        mixed = model.generate(input_ids=IDS, adapter_names=["default", "other"], **options)
        for row, adapter in enumerate(("default", "other")):
            model.set_adapter(adapter)
            alone = model.generate(input_ids=IDS[row : row + 1], **options)
            assert torch.equal(mixed.sequences[row : row + 1], alone.sequences)
            for step, logits in zip(mixed.logits, alone.logits, strict=True):
                assert error(step[row : row + 1], logits) <= TOLERANCE


def test_a_router_of_another_class_is_reported():
    """Choices that this package's routers do not see cannot be counted: an error, or a warning at the step."""

    class Foreign(nn.Module):
        def __init__(self, router: Router) -> None:
            super().__init__()
            self.route, self.weight = router.route, router.weight

        def forward(self, x: Tensor, ids: Any = None, routing: Any = None, layer: int = 0) -> tuple[Tensor, ...]:
            logits = x.reshape(-1, x.shape[-1]) @ self.weight.T
            return logits, *self.route(logits)

    model = ours(small_models.config("v3")).train()
    balancer = da.LoadBalancer(model)
    kept = model.model.layers[2].mlp.gate
    for layer in model.model.layers[1:]:
        layer.mlp.gate = Foreign(layer.mlp.gate)
    with pytest.raises(ValueError, match="a model with routers"):
        da.LoadBalancer(model)
    model.unused = kept
    model(IDS, labels=IDS).loss.backward()
    with pytest.warns(UserWarning, match="no router has counted a token"):
        balancer.step()
