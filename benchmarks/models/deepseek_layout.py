"""Config and tensor names of DeepSeek's inference code: its `ModelArgs`, and our state dict under its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import deepseek_arch as da

__all__ = ["arguments", "renamed", "unsupported"]

_NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers": "layers",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn.wq",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_layernorm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attn.wkv_a",
    "self_attn.kv_a_layernorm": "attn.kv_norm",
    "self_attn.kv_b_proj": "attn.wkv_b",
    "self_attn.o_proj": "attn.wo",
    "mlp": "ffn",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "e_score_correction_bias": "bias",
}


def unsupported(config: da.DeepseekConfig) -> str | None:
    """Returns the reason why its model.py does not compute what `config` asks for; None if it does."""
    c, scaling = config, config.rope_scaling or {}
    sigmoid = c.scoring_func == "sigmoid"
    has_bias = c.hidden_size == 7168  # the condition in its Gate
    for wrong, why in (
        (c.index_topk is not None, "sparse attention"),
        (c.moe_layer_freq != 1, f"experts in every layer numbered by moe_layer_freq {c.moe_layer_freq}"),
        (not c.n_routed_experts or not c.n_shared_experts, "layers without routed or without shared experts"),
        (c.tie_word_embeddings or c.attention_bias, "tied embeddings or biases"),
        ({c.rms_norm_eps, c.latent_norm_eps} != {1e-6}, "norms with another epsilon than 1e-6"),
        (bool(c.norm_topk_prob) != sigmoid, f"norm_topk_prob {c.norm_topk_prob} with {c.scoring_func} scores"),
        (sigmoid and c.n_group > 1 and not has_bias, "groups by their two best scores, but where hidden_size is 7168"),
        (scaling.get("type", "yarn") != "yarn", f"rope scaling of type {scaling.get('type')!r}"),
        (len({scaling.get("mscale"), scaling.get("mscale_all_dim")}) > 1, "mscale unlike mscale_all_dim"),
        (bool(scaling) and "mscale" not in scaling, "rope scaling without mscale"),
    ):
        if wrong:
            return f"it has no {why}"
    return None


def arguments(config: da.DeepseekConfig, room: int) -> dict[str, Any]:
    """Returns the fields of its `ModelArgs`, for one sequence of up to `room` tokens.

    It scales rotary frequencies only if the cache is longer than the original context: here it always is.

    Raises:
        ValueError: it cannot run this config.
    """
    if why := unsupported(config):
        raise ValueError(f"expected a config that DeepSeek's inference code runs, but {why}")
    c, scaling = config, config.rope_scaling
    fields: dict[str, Any] = {
        "max_batch_size": 1,
        "max_seq_len": room,
        "dtype": "bf16",
        "vocab_size": c.vocab_size,
        "dim": c.hidden_size,
        "inter_dim": c.intermediate_size,
        "moe_inter_dim": c.moe_intermediate_size,
        "n_layers": c.num_hidden_layers,
        "n_dense_layers": c.first_k_dense_replace,
        "n_heads": c.num_attention_heads,
        "n_routed_experts": c.n_routed_experts,
        "n_shared_experts": c.n_shared_experts,
        "n_activated_experts": c.num_experts_per_tok,
        "n_expert_groups": c.n_group,
        "n_limited_groups": c.topk_group,
        "score_func": c.scoring_func,
        "route_scale": c.routed_scaling_factor,
        "q_lora_rank": c.q_lora_rank or 0,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "rope_theta": c.rope_theta,
        "original_seq_len": room,
    }
    if scaling is None:
        return fields
    original = scaling["original_max_position_embeddings"]
    fields |= {"original_seq_len": original, "max_seq_len": max(room, original + 1), "rope_factor": scaling["factor"]}
    fields |= {"beta_fast": scaling.get("beta_fast", 32), "beta_slow": scaling.get("beta_slow", 1)}
    return fields | {"mscale": scaling.get("mscale_all_dim") or 0.0}


def renamed(state: Mapping[str, Tensor], with_bias: bool) -> dict[str, Tensor]:
    """Returns our state dict under its names: views of the same memory, the stacked experts one by one.

    Args:
        with_bias: keep the router's bias; otherwise it is left out, which is right for random models, where it is zero.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for ours, theirs in _NAMES.items():
            new = re.sub(rf"(^|(?<=\.)){re.escape(ours)}(?=\.|$)", theirs, new)
        prefix, stacked, _ = new.partition(".gate_up_proj")
        if stacked:
            for i, both in enumerate(tensor):
                out[f"{prefix}.{i}.w1.weight"], out[f"{prefix}.{i}.w3.weight"] = both.chunk(2)
        elif tensor.ndim == 3:
            prefix = new.removesuffix(".w2")
            out |= {f"{prefix}.{i}.w2.weight": one for i, one in enumerate(tensor)}
        elif with_bias or not new.endswith("gate.bias"):
            out[new] = tensor
    return out
