"""Tiny configs of every kind, models with random weights that all affect the output, and the measure of errors."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_arch.config.deepseek_config import DeepseekConfig
from support import published

# Sizes of all kinds: small, and all different, so that a swapped dimension cannot pass.
_BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}
_V3 = {
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 28,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_V2 = {
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}
# 16 heads: with fewer, many keys score exactly 0 (TRAPS G8). Few keys, so that short sequences are beyond them (G4).
_INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}
KINDS = {
    "v3": _V3,
    "v2": _V2
    | {"q_lora_rank": 28, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    | {"routed_scaling_factor": 16.0},
    "v2-lite": _V2
    | {"q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None}
    | {"routed_scaling_factor": 1.0},
    "kimi": _V3 | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    "moonlight": _V3
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "n_shared_experts": 2}
    | {"q_lora_rank": None, "rms_norm_eps": 1e-5, "rope_theta": 50000.0},
    "glm": _V3
    | {"model_type": "glm4_moe_lite", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8}
    | {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
}
SPARSE_KINDS = {
    "v32": _V3 | _INDEXER | {"model_type": "deepseek_v32"},
    "glm-5": _V3
    | _INDEXER
    | {"model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}
    | {"indexer_rope_interleave": True, "indexer_types": ("full", "shared", "full")},
}
# The published factors, with a context so short that tiny rotary sizes have pairs at both ends of the ramp and between.
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def config(kind: str = "v3", **changes) -> DeepseekConfig:
    return DeepseekConfig(**(_BASE | (KINDS | SPARSE_KINDS)[kind] | changes))


def model(cfg: DeepseekConfig, seed: int = 0, bias_mean: float = 0.0, weights: dict[str, Tensor] | None = None):
    """Returns a float32 `DeepseekLM` in eval mode with `weights`, by default `published.random_weights`."""
    from deepseek_arch.models.causal_lm import DeepseekLM

    lm = DeepseekLM(cfg, dtype=torch.float32)
    weights = published.random_weights(cfg, seed, bias_mean) if weights is None else weights
    lm.load_state_dict(published.stack(weights, cfg))
    return lm.eval()


def tokens(cfg: DeepseekConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, expected: Tensor) -> float:
    """Returns the largest difference relative to the largest expected magnitude."""
    assert got.shape == expected.shape, (tuple(got.shape), tuple(expected.shape))
    got, expected = got.detach().double(), expected.detach().double()
    assert torch.isfinite(expected).all(), "the expected values are not finite"
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
