"""The model types of the family: the defaults of their authors' code, and their classes in transformers."""

from __future__ import annotations

from typing import Any

__all__ = ["ARCHITECTURES", "MODEL_TYPES", "V4"]

# What a file of each model type leaves out, because its authors' code has it as a default. Published files of these
# model types differ in nothing else that changes the computation.
_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": _SIGMOID,
    "deepseek_v32": _SIGMOID,
    "kimi_k2": _SIGMOID,
    "glm4_moe_lite": {**_SIGMOID, "first_k_dense_replace": 1},
    "glm_moe_dsa": {**_SIGMOID, "first_k_dense_replace": 3, "indexer_rope_interleave": True},
}
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
V4 = (
    "V4 replaced latent attention by compressed sparse attention and hyper-connections, so none of these modules can "
    "compute it"
)
