"""Attention cut by heads under transformers' tensor-parallel plans: losses and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import deepseek_arch.hf as dhf
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from support import small_models
from support.cut_models import whole
from support.ranks import run_ranks
from support.small_models import error

distributed = pytest.importorskip("transformers.distributed", reason="transformers without DistributedConfig")
if not hasattr(distributed, "DistributedConfig"):
    pytest.skip("transformers without DistributedConfig", allow_module_level=True)

# transformers' plan for V3 leaves attention whole; these are its rules for the other families.
STYLES = {
    "q_b_proj": "colwise",
    "kv_a_proj_with_mqa": "mla_kv_a_proj",  # sums the gradient of the rotated key, which all heads share (TRAPS S1)
    "kv_b_proj": "colwise",
    "o_proj": "rowwise",
}
V3 = {f"{layers}.self_attn.{name}": style for layers in ("model.layers.*", "mtp.*") for name, style in STYLES.items()}


def trained(model, ids):
    model.train()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return float(whole(out.loss.detach())), grads


def on_ranks(rank, folder, plan, options, ids):
    transformers.logging.set_verbosity_error()
    dhf.register()
    config = distributed.DistributedConfig(tp_size=2, tp_plan=plan)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config, **options)
    cut = [p.to_local().shape[0] * 2 == p.shape[0] for n, p in model.named_parameters() if "kv_b_proj" in n]
    return *trained(model, ids), all(cut)


@pytest.mark.parametrize(("kind", "plan"), [("v2", "auto"), ("v2-lite", "auto"), ("glm", "auto"), ("v3", V3)])
def test_gradients_are_those_of_one_process(tmp_path, kind, plan):
    depth = {"num_nextn_predict_layers": 1} if kind == "v3" else {}
    options = {"mtp_loss_weight": 0.3} if depth else {}
    config = small_models.config(kind, num_attention_heads=2, vocab_size=62, **depth)
    write_checkpoint(tmp_path / "x", config, "bf16", std=0.1)
    ids = small_models.tokens(config, 2, 9)
    loss, expected = trained(
        dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32, **options), ids
    )
    for got, grads, is_cut in run_ranks(on_ranks, 2, tmp_path / "x", plan, options, ids):
        assert is_cut
        assert got == pytest.approx(loss, rel=1e-6)
        assert grads.keys() == expected.keys()
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < 5e-6, worst
