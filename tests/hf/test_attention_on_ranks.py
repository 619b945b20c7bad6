"""Attention cut by heads under transformers' tensor-parallel plans: losses and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import deepseek_arch.hf as dhf
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from support import small_models
from support.cut_models import whole
from support.ranks import RankError, run_ranks
from support.small_models import error

distributed = pytest.importorskip("transformers.distributed", reason="transformers without DistributedConfig")
if not hasattr(distributed, "DistributedConfig"):
    pytest.skip("transformers without DistributedConfig", allow_module_level=True)

# The default plan cuts attention, as transformers' own does for the other families. One's own may leave it whole: a
# dict replaces single rules of the default one, in 5.17 all of them.
WHOLE = {
    f"{layers}.self_attn.{name}": "replicate"
    for layers in ("model.layers.*", "mtp.*")
    for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
}
if not hasattr(HfQuantizer, "update_parallel_plan"):
    WHOLE = {"model.layers.*.mlp.gate_proj": "colwise", "model.layers.*.mlp.up_proj": "colwise"}
    WHOLE |= {"model.layers.*.mlp.down_proj": "rowwise"}


def trained(model, ids):
    model.train()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return float(whole(out.loss.detach())), grads


def whole_rows(parameter):
    """Number of parts that the rows of a parameter are in."""
    return parameter.shape[0] // parameter.to_local().shape[0] if hasattr(parameter, "to_local") else 1


def on_ranks(rank, folder, plan, options, ids):
    transformers.logging.set_verbosity_error()
    dhf.register()
    config = distributed.DistributedConfig(tp_size=2, tp_plan=plan)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config, **options)
    names = [name for name, _ in model.named_parameters() if "kv_b_proj" in name]
    cut = [name for name in names if whole_rows(model.get_parameter(name)) == 2]
    with torch.no_grad():
        logits = whole(model.eval()(ids).logits)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    return *trained(model, ids), logits, tokens, cut == names, not cut


@pytest.mark.parametrize(
    ("kind", "plan"),
    [(kind, "auto") for kind in ("v2", "v2-lite", "glm", "v3", "moonlight", "kimi")] + [("v3", WHOLE)],
)
def test_logits_tokens_and_gradients_are_those_of_one_process(tmp_path, kind, plan):
    depth = {"num_nextn_predict_layers": 1} if kind == "v3" else {}
    options = {"mtp_loss_weight": 0.3} if depth else {}
    config = small_models.config(kind, num_attention_heads=2, vocab_size=62, **depth)
    write_checkpoint(tmp_path / "x", config, "bf16", std=0.1)
    ids = small_models.tokens(config, 2, 9)
    model = dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32, **options)
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    loss, expected = trained(model, ids)
    for got, grads, own_logits, own_tokens, is_cut, is_whole in run_ranks(
        on_ranks, 2, tmp_path / "x", plan, options, ids
    ):
        assert is_cut == (plan == "auto") and is_whole == (plan != "auto")
        assert error(own_logits, logits) < 2e-6
        assert torch.equal(own_tokens, tokens)
        assert got == pytest.approx(loss, rel=1e-6)
        assert grads.keys() == expected.keys()
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < 5e-6, worst


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_heads_that_ranks_cannot_share_are_refused_alike(tmp_path, kind):
    config = small_models.config(kind, num_attention_heads=3, vocab_size=62)
    write_checkpoint(tmp_path / "x", config, "bf16", std=0.1)
    ids = small_models.tokens(config, 1, 5)
    with pytest.raises(RankError, match=r"(?s)rank 0:.*expected the 2 ranks.*divide its 3 heads.*rank 1:") as caught:
        run_ranks(on_ranks, 2, tmp_path / "x", "auto", {}, ids)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("ValueError")]
    assert len(lines) == 2 and lines[0] == lines[1]
