"""Checks of a config: every field by itself, then what must hold between fields."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from .families import MODEL_TYPES
from .json_format import REQUIRED, rope_type

if TYPE_CHECKING:
    from .deepseek_config import DeepseekConfig

__all__ = ["DTYPES", "check_fields", "check_relations"]

DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_fields(c: DeepseekConfig, problems: list[str]) -> None:
    """Types and ranges, field by field; integers given for floats become floats."""
    positive = {
        *REQUIRED,
        "moe_intermediate_size",
        "n_shared_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "q_lora_rank",
        "num_key_value_heads",
        "moe_layer_freq",
        "max_position_embeddings",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
    }
    zero_allowed = {"num_nextn_predict_layers", "first_k_dense_replace"}
    optional = {f.name for f in dataclasses.fields(c) if "None" in str(f.type)}
    for name in sorted(positive | zero_allowed):
        value = getattr(c, name)
        if value is None and name in optional:
            continue
        least = 0 if name in zero_allowed or name == "n_shared_experts" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            problems.append(f"expected {name} to be an integer >= {least}, got {value!r}")
    floats = (
        "rms_norm_eps",
        "latent_norm_eps",
        "rope_theta",
        "routed_scaling_factor",
        "initializer_range",
        "attention_dropout",
    )
    for name in (*floats, "aux_loss_alpha"):
        value = getattr(c, name)
        if value is None and name == "aux_loss_alpha":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            problems.append(f"expected {name} to be a finite number >= 0, got {value!r}")
        else:
            object.__setattr__(c, name, float(value))
    for name in ("norm_topk_prob", "attention_bias", "tie_word_embeddings"):
        if not isinstance(getattr(c, name), bool):
            problems.append(f"expected {name} to be true or false, got {getattr(c, name)!r}")
    for name, allowed in (
        ("model_type", tuple(MODEL_TYPES)),
        ("scoring_func", ("sigmoid", "softmax")),
        ("topk_method", ("greedy", "group_limited_greedy", "noaux_tc")),
        ("hidden_act", ("silu",)),
        ("mtp_input", ("post_norm", "pre_norm")),
        ("mtp_chain", ("block", "head_norm")),
    ):
        if getattr(c, name) not in allowed:
            problems.append(f"expected {name} to be one of {', '.join(allowed)}, got {getattr(c, name)!r}")


def check_relations(c: DeepseekConfig, problems: list[str]) -> None:
    """What must hold between fields."""
    if c.qk_rope_head_dim % 2:
        problems.append(f"expected an even qk_rope_head_dim (rotary pairs), got {c.qk_rope_head_dim}")
    if c.num_key_value_heads != c.num_attention_heads:
        problems.append(
            "expected num_key_value_heads to equal num_attention_heads (latent attention shares no heads), "
            f"got {c.num_key_value_heads} and {c.num_attention_heads}"
        )
    if c.n_routed_experts:
        _check_routing(c, problems)
    if c.rope_theta <= 1:
        problems.append(f"expected rope_theta > 1, got {c.rope_theta}")
    if not 0 <= c.attention_dropout < 1:
        problems.append(f"expected attention_dropout in [0, 1), got {c.attention_dropout}")
    _check_rope_scaling(c, problems)
    indexer = (c.index_n_heads, c.index_head_dim, c.index_topk)
    if any(v is None for v in indexer) != all(v is None for v in indexer):
        problems.append(f"expected all or none of index_n_heads, index_head_dim, index_topk, got {indexer}")
    if c.is_sparse_attention and c.q_lora_rank is None:
        problems.append("expected a q_lora_rank with an indexer (it reads the query latent), got null")
    quantization = c.quantization_config or {}
    blocks = quantization.get("weight_block_size")
    if quantization.get("quant_method") == "fp8" and blocks is not None:
        valid = isinstance(blocks, list | tuple) and len(blocks) == 2
        if not valid or not all(isinstance(b, int) and b > 0 for b in blocks):
            problems.append(f"expected weight_block_size to be two positive integers, got {blocks!r}")


def _check_routing(c: DeepseekConfig, problems: list[str]) -> None:
    if c.moe_intermediate_size is None or c.num_experts_per_tok is None:
        problems.append(
            f"expected moe_intermediate_size and num_experts_per_tok beside n_routed_experts={c.n_routed_experts}, "
            f"got {c.moe_intermediate_size} and {c.num_experts_per_tok}"
        )
        return
    experts = c.expert_sizes
    if (c.topk_method == "noaux_tc") != (c.scoring_func == "sigmoid"):
        problems.append(
            "expected noaux_tc with sigmoid scores, greedy or group_limited_greedy with softmax scores, "
            f"got topk_method {c.topk_method} with scoring_func {c.scoring_func}"
        )
    groups, kept = experts.groups, experts.kept_groups
    if experts.routed % groups:
        problems.append(f"expected n_routed_experts to be divisible by n_group, got {experts.routed} and {groups}")
        return
    per_group = experts.routed // groups
    if kept > groups:
        problems.append(f"expected topk_group <= n_group, got {kept} and {groups}")
    if c.topk_method == "noaux_tc" and groups > 1 and per_group < 2:
        problems.append(
            "expected at least 2 experts in a group (a group's score is the sum of its two best), "
            f"got {experts.routed} experts in {groups} groups"
        )
    if experts.chosen > kept * per_group:
        problems.append(
            f"expected num_experts_per_tok <= {kept * per_group} (the experts of the kept groups), got {experts.chosen}"
        )


def _check_rope_scaling(c: DeepseekConfig, problems: list[str]) -> None:
    if c.rope_scaling is None:
        return
    kind = rope_type(c.rope_scaling)
    if kind not in ("default", "yarn"):
        problems.append(f"expected rope_scaling of type yarn or default, got {kind!r}")
        return
    if kind == "default":
        return
    least = {"factor": 1, "original_max_position_embeddings": 1}
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", *least):
        value: Any = c.rope_scaling.get(name)
        bound = least.get(name, 0)
        if value is None and name != "factor":
            continue
        positive = name.startswith("beta")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < bound or (positive and value == 0):
            relation = ">" if positive else ">="
            problems.append(f"expected rope_scaling[{name!r}] to be a finite number {relation} {bound}, got {value!r}")
