"""Our models and transformers' own with the same weights, and loading that must not warn."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models

# Wide enough for quantizers that want multiples of 64 values.
WIDE = small_models.config(
    "v3",
    hidden_size=128,
    moe_intermediate_size=64,
    intermediate_size=128,
    kv_lora_rank=64,
    q_lora_rank=64,
    v_head_dim=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
)

NATIVE = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),  # V3's geometry; transformers has no class for it
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
}


def ours(config: da.DeepseekConfig, seed: int = 0) -> dhf.DeepseekForCausalLM:
    """Our class with the telling random weights of `small_models.model`, in eval mode."""
    model = dhf.DeepseekForCausalLM(config)
    model.load_state_dict(small_models.model(config, seed).state_dict())
    return model.eval()


def native(model: dhf.DeepseekForCausalLM) -> Any:
    """transformers' own class with the same weights, which have the same names but for the MTP modules."""
    core = model.config.to_core()
    config_class, model_class = NATIVE[core.model_type]
    fields = core.to_dict() | {"model_type": config_class.model_type, "num_nextn_predict_layers": 0}
    # Given, also where there are none: its own defaults are 0 and 1.
    fields |= {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id")}
    twin = model_class(config_class.from_dict(fields))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    return twin.eval()


def load_silently(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` where any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return cls.from_pretrained(*args, **kwargs)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
