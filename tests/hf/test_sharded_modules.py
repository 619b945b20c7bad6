"""Models that others have taken apart: sharded by FSDP on two processes, offloaded to memory or disk by accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from twins import ours

import deepseek_arch as da
from deepseek_arch.moe.load_balancer import routers
from support import small_models
from support.ranks import run_ranks
from support.small_models import error, tokens

CONFIG = small_models.config("v3", num_nextn_predict_layers=1)
IDS = tokens(CONFIG, 4, 9)
TOLERANCE = 2e-5
RATE = 0.25


def made(kind: str) -> Any:
    if kind == "core":
        return small_models.model(CONFIG)
    model = ours(CONFIG)
    model.config.mtp_loss_weight = 0.3
    return model


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids, labels=ids)
    return out.loss if hasattr(model, "generate") else out.loss + 0.3 * out.mtp_loss


@torch.no_grad()
def text_of(model: Any, mtp: bool) -> torch.Tensor:
    if hasattr(model, "generate"):
        return model.generate(IDS, max_new_tokens=4, do_sample=False, use_mtp=mtp, pad_token_id=None)
    return da.generate(model, IDS, max_new_tokens=4, mtp_depth=int(mtp))


def biases_of(model: Any) -> list[torch.Tensor]:
    return [router.e_score_correction_bias.clone() for router in routers(model).values()]


def sharded(rank: int, kind: str) -> dict[str, Any]:
    """A step on half of the rows, and a text: what a user of `fully_shard` does."""
    from torch.distributed.fsdp import fully_shard

    model = made(kind).train()
    for layer in (*model.model.layers, *model.mtp):
        fully_shard(layer)
    fully_shard(model)
    balancer = da.LoadBalancer(model, rate=RATE)
    loss = loss_of(model, IDS[2 * rank : 2 * rank + 2])
    loss.backward()
    balancer.step()
    gradients = {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters() if p.grad is not None}
    moved = [bias.numpy() for bias in biases_of(model)]
    fresh = made(kind).eval()
    for layer in (*fresh.model.layers, *fresh.mtp):
        fully_shard(layer)
    fully_shard(fresh)
    return {"gradients": gradients, "biases": moved, "texts": [text_of(fresh, mtp).numpy() for mtp in (False, True)]}


@pytest.mark.parametrize("kind", ["core", "hf"])
def test_a_model_under_fsdp_trains_counts_and_decodes_as_whole(kind):
    model = made(kind).train()
    balancer = da.LoadBalancer(model, rate=RATE)
    loss_of(model, IDS).backward()
    balancer.step()
    texts = [text_of(made(kind).eval(), mtp) for mtp in (False, True)]
    results = run_ranks(sharded, 2, kind)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for result in results:
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert error(torch.from_numpy(result["gradients"][name]), gradient) <= TOLERANCE, name
        for got, bias in zip(result["biases"], biases_of(model), strict=True):
            assert torch.equal(torch.from_numpy(got), bias)
        for got, text in zip(result["texts"], texts, strict=True):
            assert torch.equal(torch.from_numpy(got), text)


@pytest.mark.parametrize("where", ["memory", "disk", "some layers on disk"])
@pytest.mark.parametrize("kind", ["core", "hf"])
def test_an_offloaded_model_decodes_and_passes_gradients_on(kind, where, tmp_path):
    """Parameters come for a module's own forward and go again; what reads them around it finds the meta device."""
    accelerate = pytest.importorskip("accelerate")
    whole = made(kind).eval()
    model = made(kind).eval()
    if where == "memory":
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu", offload_buffers=True)
    else:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "mtp": "cpu"}
        layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(CONFIG.num_hidden_layers)}
        accelerate.dispatch_model(
            model, places | layers, main_device="cpu", offload_dir=str(tmp_path), offload_buffers=True, force_hooks=True
        )
    assert any(parameter.is_meta for parameter in model.parameters())
    for mtp in (False, True):
        assert torch.equal(text_of(model, mtp), text_of(whole, mtp))
    if kind == "core":
        return  # it reads ids, and the parameters are accelerate's to move
    gradients = []
    for each in (whole, model):
        embeddings = whole.model.embed_tokens(IDS).detach().requires_grad_(True)
        each(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append(embeddings.grad)
    assert error(gradients[1], gradients[0]) <= TOLERANCE


@pytest.mark.parametrize("kind", ["core", "hf"])
def test_training_offloaded_parameters_is_refused_and_frozen_ones_pass_gradients_on(kind):
    """The gradients go to copies that are gone after the forward pass; natively nothing says so."""
    accelerate = pytest.importorskip("accelerate")
    model = made(kind).train()
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match=r"expected parameters in memory in training, got an offloaded one \(.*embed"):
        model(IDS, labels=IDS)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    model.requires_grad_(False)
    if kind == "hf":
        embeddings = made(kind).model.embed_tokens(IDS).detach().requires_grad_(True)
        model(inputs_embeds=embeddings).logits.square().sum().backward()
        assert embeddings.grad.abs().sum() > 0
