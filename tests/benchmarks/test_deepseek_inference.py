"""DeepSeek's inference code as a contestant: the configs that it runs, and its tensor names.

The code itself is not in this repository. By hand it was run against V2-Lite's, V3's and an ungrouped sigmoid
router, all small: logits agree to 2e-6 in float32.
"""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from benchmarks.models.contestants import comparable, random_model
from benchmarks.models.deepseek_inference import DeepseekInference
from benchmarks.models.deepseek_layout import arguments, renamed, unsupported

LITE = comparable(da.DeepseekConfig.from_pretrained("deepseek-v2-lite"))
V3 = comparable(da.DeepseekConfig.from_pretrained("deepseek-v3"))
SMALL = LITE.replace(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
)


def test_its_arguments_are_those_of_its_published_configs():
    lite = arguments(LITE, room=8192)
    # inference/configs/config_16B.json, where it is not the default of ModelArgs
    assert (
        lite.items()
        >= {
            "vocab_size": 102400,
            "dim": 2048,
            "inter_dim": 10944,
            "moe_inter_dim": 1408,
            "n_layers": 27,
            "n_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "n_activated_experts": 6,
            "route_scale": 1.0,
            "q_lora_rank": 0,
            "kv_lora_rank": 512,
            "mscale": 0.707,
            "score_func": "softmax",
            "rope_factor": 40,
            "original_seq_len": 4096,
            "max_seq_len": 8192,
        }.items()
    )
    v3 = arguments(V3, room=8192)
    assert (v3["n_expert_groups"], v3["n_limited_groups"], v3["route_scale"], v3["q_lora_rank"]) == (8, 4, 2.5, 1536)
    # It scales frequencies only beyond the original context, and without scaling never.
    assert arguments(LITE, room=64)["max_seq_len"] == 4097
    plain = arguments(LITE.replace(rope_scaling=None), room=64)
    assert plain["max_seq_len"] == plain["original_seq_len"] == 64


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rms_norm_eps": 1e-5}, "epsilon"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"norm_topk_prob": True}, "norm_topk_prob True with softmax"),
        ({"rope_scaling": LITE.rope_scaling | {"mscale": 1.0}}, "mscale unlike"),
        ({"n_shared_experts": None}, "shared experts"),
    ],
)
def test_a_config_that_it_would_compute_otherwise_is_refused(changes, why):
    with pytest.raises(ValueError, match=f"DeepSeek's inference code runs, but it has no .*{why}"):
        arguments(LITE.replace(**changes), room=64)


def test_groups_by_two_scores_are_there_for_one_hidden_size():
    assert unsupported(V3) is None
    assert "hidden_size is 7168" in unsupported(V3.replace(hidden_size=1024))


def test_every_tensor_has_a_name_there_and_shares_our_memory():
    model = random_model(SMALL, torch.float32)
    ours = model.state_dict()
    theirs = renamed(ours, with_bias=False)
    layer = ("attn.wq", "attn.wkv_a", "attn.kv_norm", "attn.wkv_b", "attn.wo", "attn_norm", "ffn_norm")
    parts = ("w1", "w2", "w3")
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    expected |= {f"layers.0.ffn.{part}.weight" for part in parts}
    expected |= {f"layers.1.ffn.experts.{i}.{part}.weight" for i in range(4) for part in parts}
    expected |= {f"layers.1.ffn.shared_experts.{part}.weight" for part in parts}
    expected |= {"embed.weight", "norm.weight", "head.weight", "layers.1.ffn.gate.weight"}
    assert set(theirs) == expected
    both = ours["model.layers.1.mlp.experts.gate_up_proj"]
    assert theirs["layers.1.ffn.experts.2.w3.weight"].data_ptr() == both[2, 16:].data_ptr()
    assert theirs["layers.1.ffn.experts.2.w1.weight"].shape == (16, 32)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in ours.values())


STAND_IN = """
import torch
from kernel import fp8_gemm

class ModelArgs:
    def __init__(self, vocab_size, **rest):
        self.vocab_size = vocab_size

class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.logits = torch.ones(1, args.vocab_size)
    def load_state_dict(self, state, assign):
        pass
    def forward(self, tokens, start_pos):
        return self.logits
"""


def test_code_with_other_logits_is_not_timed(tmp_path):
    with pytest.raises(ValueError, match=r"a folder with model\.py"):
        DeepseekInference(tmp_path, SMALL, "fp32", 1, 64)
    (tmp_path / "model.py").write_text(STAND_IN)  # without a kernel.py: a failing import of it must not matter
    with pytest.raises(ValueError, match="refusing to time"):
        DeepseekInference(tmp_path, SMALL, "fp32", 1, 64)
