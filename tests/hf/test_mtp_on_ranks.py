"""MTP modules under transformers' parallel plans: cut as layers are, with the same losses, gradients and texts."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from support.cut_models import whole
from support.ranks import run_ranks
from support.small_models import error

distributed = pytest.importorskip("transformers.distributed", reason="transformers without DistributedConfig")
if not hasattr(distributed, "DistributedConfig"):
    pytest.skip("transformers without DistributedConfig", allow_module_level=True)

has_ep = pytest.mark.skipif(
    "ep_size" not in inspect.signature(distributed.DistributedConfig).parameters, reason="transformers without ep_size"
)
CONFIG = da.DeepseekConfig.from_pretrained("tiny").replace(num_hidden_layers=2, num_nextn_predict_layers=1)
IDS = torch.randint(CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


def outcome(model):
    with torch.no_grad():
        tokens = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_mtp=True, eos_token_id=None)
    model.train()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    grads = {
        name: whole(p.grad) for name, p in model.named_parameters() if name.startswith("mtp.") and p.grad is not None
    }
    return tokens, float(whole(out.loss.detach())), float(whole(out.mtp_loss.detach())), grads


def on_ranks(rank, folder, axes):
    transformers.logging.set_verbosity_error()
    dhf.register()
    config = distributed.DistributedConfig(**axes)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=config, mtp_loss_weight=0.3
    )
    cut = {
        name: p.to_local().numel() / p.numel()
        for name, p in model.named_parameters()
        if name.startswith("mtp.") and hasattr(p, "to_local")
    }
    return outcome(model), cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mtp") / "bf16"
    write_checkpoint(path, CONFIG, "bf16", std=0.1)
    return path


@pytest.mark.parametrize(
    "axes",
    [
        {"tp_plan": "auto", "tp_size": 2},
        pytest.param({"ep_size": 2, "fsdp_size": 2}, marks=has_ep),
        {"fsdp_size": 2},
    ],
    ids=str,
)
def test_mtp_modules_are_cut_as_layers_are(folder, axes):
    model = dhf.DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32, mtp_loss_weight=0.3)
    tokens, loss, mtp_loss, expected = outcome(model)
    for (got, own_loss, own_mtp_loss, grads), cut in run_ranks(on_ranks, 2, folder, axes):
        assert torch.equal(got, tokens)
        assert own_loss == pytest.approx(loss, rel=1e-5) and own_mtp_loss == pytest.approx(mtp_loss, rel=1e-5)
        assert cut["mtp.0.mlp.experts.gate_up_proj"] == cut["mtp.0.mlp.experts.down_proj"] == 0.5
        assert grads.keys() == expected.keys()
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < 1e-5, worst
