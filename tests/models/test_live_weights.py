"""Weights of a model in training, under published names and as matrices."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import deepseek_arch as da
from support import small_models
from support.small_models import error, tokens

CONFIG = small_models.config("v3", num_nextn_predict_layers=1)


def files_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["core", "core fp8", "hf", "tied"])
def test_published_names_and_values_of_a_save(tmp_path, kind):
    """All but the copies of embedding and head that the files repeat in each prediction module."""
    config = CONFIG if kind != "tied" else small_models.config("v3", tie_word_embeddings=True)
    model = small_models.model(config)
    if kind == "core fp8":
        da.save(model, tmp_path / "fp8", "fp8")
        model = da.load(tmp_path / "fp8")
    da.save(model, tmp_path / "saved")
    expected = files_of(tmp_path / "saved" if kind != "core fp8" else tmp_path / "fp8")
    if kind == "hf":
        pytest.importorskip("transformers")
        import deepseek_arch.hf as dhf

        model = dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "saved")
    got = dict(da.published_tensors(model))
    copies = {name for name in expected if name.endswith(("2.embed_tokens.weight", "shared_head.head.weight"))}
    copies |= {name for name in expected if name == "model.layers.3.embed_tokens.weight"}
    assert got.keys() == expected.keys() - copies
    got = dict(da.published_tensors(model, repeated=True))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype and not tensor.requires_grad
        assert torch.equal(tensor.float(), expected[name].float()), name


def test_they_are_the_live_weights():
    model = small_models.model(CONFIG)
    tensors = dict(da.published_tensors(model))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[3, 2] += 1
    rows = model.model.layers[1].mlp.experts.gate_up_proj[3]
    assert torch.equal(tensors["model.layers.1.mlp.experts.3.gate_proj.weight"], rows[: CONFIG.moe_intermediate_size])


def test_what_has_no_published_names_is_refused():
    with pytest.raises(ValueError, match="got Linear"):
        dict(da.published_tensors(torch.nn.Linear(2, 2)))
    model = small_models.model(CONFIG)
    model.lm_head = torch.nn.Linear(CONFIG.hidden_size, 3, bias=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        dict(da.published_tensors(model))


def test_muon_updates_each_expert_as_a_matrix_of_its_own():
    """As on separate tensors with the same gradients, for three steps with momentum."""
    model, ids = small_models.model(CONFIG).train(), tokens(CONFIG, 2, 9)
    matrices = da.ParameterMatrices(model)
    inner = {name: m for name, m in matrices.items() if "embed" not in name and "lm_head" not in name}
    assert sum(".experts.gate_up_proj[" in name for name in inner) == 3 * 2 * CONFIG.n_routed_experts
    twin = {name: torch.nn.Parameter(m.detach().clone()) for name, m in inner.items()}
    muon, other = torch.optim.Muon(inner.values(), lr=0.02), torch.optim.Muon(twin.values(), lr=0.02)
    matrices.feed(muon)
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    for _ in range(3):
        out = model(ids, labels=ids)
        (out.loss + out.mtp_loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        for name, parameter in twin.items():
            whole, _, part = name.partition("[")
            grad = grads[whole]
            if part:
                expert, rows = part.rstrip("]").split(", ")
                first, end = map(int, rows.split(":"))
                grad = grad[int(expert), first:end]
            parameter.grad = grad.clone()
        before = stack.detach().clone()
        muon.step()
        muon.zero_grad()
        other.step()
        assert not torch.equal(stack, before) and stack.grad is None
        for name, parameter in twin.items():
            assert error(inner[name], parameter) < 1e-5, name
    assert torch.equal(inner["model.layers.1.mlp.experts.gate_up_proj[0, 0:20]"], stack[0, :20])
