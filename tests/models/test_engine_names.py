"""Published names against those that a serving engine loads: vLLM's DeepSeek-V2/V3 classes and its MTP drafter.

The engine is not installed here. What stands below are its parameters' names and the rules by which its loaders place a
published tensor (vllm/model_executor/models/deepseek_v2.py and deepseek_mtp.py), written as a table: whatever is sent
must land somewhere, and every parameter must be filled, buffers and drafts included.
"""

from __future__ import annotations

import re

import pytest
import torch

import deepseek_arch as da
from support import small_models

# Published parts of a parameter that the engine fuses, in the order of their rows.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
OF_THE_MODULE = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")


def block_parameters(c, layer: int) -> dict[str, int]:
    """Names below a decoder layer, and the number of published tensors that fill each."""
    attention = {"kv_a_layernorm": 1, "kv_b_proj": 1, "o_proj": 1}
    if c.q_lora_rank is None:
        attention |= {"q_proj": 1, "kv_a_proj_with_mqa": 1}
    else:
        attention |= {"fused_qkv_a_proj": 2, "q_a_layernorm": 1, "q_b_proj": 1}
    names = {f"self_attn.{name}.weight": count for name, count in attention.items()}
    names |= {"input_layernorm.weight": 1, "post_attention_layernorm.weight": 1}
    if not c.is_moe_layer(layer):
        return names | {"mlp.gate_up_proj.weight": 2, "mlp.down_proj.weight": 1}
    experts = c.n_routed_experts
    names |= {"mlp.gate.weight": 1, "mlp.experts.w13_weight": 2 * experts, "mlp.experts.w2_weight": experts}
    if c.topk_method == "noaux_tc":
        names["mlp.gate.e_score_correction_bias"] = 1
    return names | {"mlp.shared_experts.gate_up_proj.weight": 2, "mlp.shared_experts.down_proj.weight": 1}


def engine_parameters(c, drafter: bool) -> dict[str, int]:
    if not drafter:
        names = {"model.embed_tokens.weight": 1, "model.norm.weight": 1, "lm_head.weight": 1}
        layers = range(c.num_hidden_layers)
        return names | {f"model.layers.{i}.{n}": k for i in layers for n, k in block_parameters(c, i).items()}
    names = {}
    for i in range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers):
        names |= {f"model.layers.{i}.{name}.weight": 1 for name in OF_THE_MODULE}
        names |= {f"model.layers.{i}.mtp_block.{n}": k for n, k in block_parameters(c, i).items()}
    return names | {"model.embed_tokens.weight": c.num_nextn_predict_layers}


def place(name: str, c, drafter: bool) -> str | None:
    """Returns the engine's parameter that a published tensor goes to, None for one that its loader skips."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    drafts = found is not None and int(found[1]) >= c.num_hidden_layers
    if drafts != drafter:
        return None
    if drafts:
        if ".embed_tokens." in name:
            return "model.embed_tokens.weight"
        if not any(f".{part}." in name for part in OF_THE_MODULE):
            name = name.replace(found[0], f"{found[0]}mtp_block.")
    if expert := re.search(r"experts\.\d+\.(gate|up|down)_proj\.weight$", name):
        return name[: expert.start()] + ("experts.w2_weight" if expert[1] == "down" else "experts.w13_weight")
    for fused, parts in FUSED.items():
        for part in parts:
            if f".{part}." in name and not (fused == "fused_qkv_a_proj" and c.q_lora_rank is None):
                return name.replace(f".{part}.", f".{fused}.")
    return name


@pytest.mark.parametrize(
    ("kind", "drafter"),
    [("v3", False), ("v3", True), ("two modules", False), ("two modules", True), ("v2", False), ("v2-lite", False)],
)
def test_every_parameter_of_the_engine_is_filled_and_nothing_is_left_over(kind, drafter):
    changes = {"v3": {"num_nextn_predict_layers": 1}, "two modules": {"num_nextn_predict_layers": 2}}.get(kind, {})
    config = small_models.config("v3" if kind == "two modules" else kind, **changes)
    filled: dict[str, int] = {}
    for name, _ in da.published_tensors(small_models.model(config), repeated=drafter):
        target = place(name, config, drafter)
        if target is not None:
            filled[target] = filled.get(target, 0) + 1
    assert filled == engine_parameters(config, drafter)


def test_without_the_copies_a_drafter_keeps_old_embeddings():
    config = small_models.config("v3", num_nextn_predict_layers=1)
    sent = {place(name, config, True) for name, _ in da.published_tensors(small_models.model(config))}
    missing = engine_parameters(config, True).keys() - sent
    head = f"model.layers.{config.num_hidden_layers}.shared_head.head.weight"
    assert missing == {"model.embed_tokens.weight", head}


def test_fused_parameters_get_their_parts_in_order():
    """Rows of an expert's `w13` are its gate above its up, and biases are the live buffers."""
    config = small_models.config("v3", num_nextn_predict_layers=1)
    model = small_models.model(config)
    layer, sent, prefix = model.model.layers[1], dict(da.published_tensors(model)), "model.layers.1."
    for expert in range(config.n_routed_experts):
        parts = [sent[f"{prefix}mlp.experts.{expert}.{part}.weight"] for part in FUSED["gate_up_proj"]]
        assert torch.equal(torch.cat(parts), layer.mlp.experts.gate_up_proj[expert])
    bias = sent[f"{prefix}mlp.gate.e_score_correction_bias"]
    assert bias.data_ptr() == layer.mlp.gate.e_score_correction_bias.data_ptr()
