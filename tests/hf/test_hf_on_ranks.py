"""FP8 checkpoints on several ranks through transformers' `DistributedConfig`: codes and scales are cut alike."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.hf.fp8_config import DeepseekFP8Config
from support.cut_models import whole
from support.ranks import RankError, run_ranks
from support.small_models import error

distributed = pytest.importorskip("transformers.distributed", reason="transformers without DistributedConfig")
if not hasattr(distributed, "DistributedConfig"):
    pytest.skip("transformers without DistributedConfig", allow_module_level=True)

# Sums of some hundred products in another order; another block's scale shows in the first digit.
SAME = 50 * torch.finfo(torch.float32).eps
PLANS = hasattr(HfQuantizer, "update_parallel_plan")
plans = pytest.mark.skipif(not PLANS, reason="this transformers cuts codes without their scales")
TINY = da.DeepseekConfig.from_pretrained("tiny")


def logits_of(model, config):
    ids = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return whole(model(ids).logits).float()


def on_ranks(rank, folder, axes, dequantize):
    transformers.logging.set_verbosity_error()
    dhf.register()
    options = {"quantization_config": DeepseekFP8Config(dequantize=True)} if dequantize else {}
    config = distributed.DistributedConfig(**axes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config, **options)
    shapes = {
        name: (tuple(p.shape), tuple(p.to_local().shape))
        for name, p in model.named_parameters()
        if hasattr(p, "to_local") and "layers.1." in name
    }
    return logits_of(model, TINY), shapes


def checkpoint(tmp_path, **changes):
    config = TINY.replace(num_hidden_layers=2, num_nextn_predict_layers=0, **changes)
    write_checkpoint(tmp_path / "fp8", config, "fp8", std=0.3)
    return tmp_path / "fp8"


def expected_logits(folder):
    model = dhf.DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits_of(model, TINY)


TP2 = {"tp_plan": "auto", "tp_size": 2}
# Heads of whole blocks, and widths of them for each of two ranks; float32 activations, so that only the order of
# sums differs.
HEADS = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
ALIGNED = HEADS | {"intermediate_size": 256, "moe_intermediate_size": 256}


@plans
@pytest.mark.parametrize(
    ("axes", "widths", "dequantize"),
    [
        ({"ep_size": 2, "fsdp_size": 2}, {}, False),
        (TP2, ALIGNED, False),
        (TP2, ALIGNED, True),
    ],
    ids=str,
)
def test_fp8_weights_on_two_ranks_are_those_of_one(tmp_path, axes, widths, dequantize):
    folder = checkpoint(tmp_path, **widths)
    expected = expected_logits(folder)
    for logits, shapes in run_ranks(on_ranks, 2, folder, axes, dequantize):
        assert error(logits, expected) < SAME
        for name, (full, local) in shapes.items():
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                assert local[0] * 2 == full[0] or local[1] * 2 == full[1] or local[2] * 2 == full[2], name
            if "experts" in name and name.endswith("_scale_inv"):  # cut where the codes are cut
                codes, part = shapes[name.removesuffix("_scale_inv")]
                assert [a == b for a, b in zip(full, local, strict=True)] == [
                    a == b for a, b in zip(codes, part, strict=True)
                ]


@plans
@pytest.mark.parametrize(
    ("axes", "widths", "dequantize", "message"),
    [
        (TP2, {}, False, r"self_attn\.q_b_proj\.weight has 192 rows over tp=2"),
        (TP2, HEADS | {"intermediate_size": 176}, False, r"mlp\.gate_proj\.weight has 176 rows over tp=2"),
        (TP2, HEADS | {"intermediate_size": 176}, True, r"mlp\.gate_proj\.weight has 176 rows over tp=2"),
        (TP2, HEADS | {"intermediate_size": 256}, False, r"experts\.gate_up_proj has 144 rows over tp=2"),
        ({"fsdp_size": 2}, {}, True, r"kv_a_proj_with_mqa\.weight has 80 rows over fsdp=2"),
    ],
)
def test_a_cut_inside_a_block_is_refused_alike_on_every_rank(tmp_path, axes, widths, dequantize, message):
    """With 176 rows each rank gets 88 and one row of scales: shapes that fit, and wrong numbers."""
    folder = checkpoint(tmp_path, **widths)
    expected = rf"(?s)rank 0:.*expected FP8 weights that are cut between.*{message}"
    with pytest.raises(RankError, match=expected) as caught:
        run_ranks(on_ranks, 2, folder, axes, dequantize)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("ValueError")]
    assert len(lines) == 2 and lines[0] == lines[1]


@pytest.mark.skipif(PLANS, reason="only older versions cut codes without their scales")
def test_a_transformers_that_cuts_codes_alone_is_refused(tmp_path):
    folder = checkpoint(tmp_path, **ALIGNED)
    with pytest.raises(RankError, match=r"(?s)rank 0:.*take part in parallel plans.*rank 1:.*take part in"):
        run_ranks(on_ranks, 2, folder, TP2, False)
