"""DeepSeek-family models in PyTorch: latent attention, mixture of experts, multi-token prediction, checkpoints.

    import deepseek_arch as da

    model = da.load("path/to/checkpoint")
    tokens = da.generate(model, input_ids)

The names below are imported when first used, so that the command line starts without PyTorch. `deepseek_arch.hf`, the
transformers integration, is imported explicitly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_arch.accounting import ParameterCount, count_parameters, flops_per_token, kv_cache_bytes, weight_bytes
    from deepseek_arch.balance import BalanceLoss, Capacity, LoadBalancer
    from deepseek_arch.cache import LatentCache
    from deepseek_arch.checkpoint import CheckpointError, convert, inspect_checkpoint, load, save, slice_checkpoint
    from deepseek_arch.config import ConfigError, DeepseekConfig, UnsupportedModelError, presets
    from deepseek_arch.decoding import FixedStep
    from deepseek_arch.fp8_linear import FP8Experts, FP8Linear, dequantize, keep_fp8
    from deepseek_arch.fp8_recipe import (
        V3_RECIPE,
        Policy,
        Precision,
        Rule,
        fp8_sensitivity,
        fp8_training,
        remove_fp8_training,
    )
    from deepseek_arch.generation import generate
    from deepseek_arch.linear import Linear
    from deepseek_arch.mla import MultiHeadLatentAttention
    from deepseek_arch.mlp import MLP
    from deepseek_arch.model import CausalLMOutput, DecoderLayer, DeepseekLM, DeepseekModel
    from deepseek_arch.moe import Experts, MoE, Router
    from deepseek_arch.mtp import MTPLayer
    from deepseek_arch.norm import RMSNorm
    from deepseek_arch.probe import MTPProbe, probe_mtp
    from deepseek_arch.rope import RotaryEmbedding
    from deepseek_arch.routing import RoutingRecord, routing_agreement
    from deepseek_arch.speculative import SpeculationReport
    from deepseek_arch.static_cache import StaticLatentCache
    from deepseek_arch.telemetry import LoadHistory, LoadReport, Placement, plan_placement

__all__ = [
    "MLP",
    "V3_RECIPE",
    "BalanceLoss",
    "Capacity",
    "CausalLMOutput",
    "CheckpointError",
    "ConfigError",
    "DecoderLayer",
    "DeepseekConfig",
    "DeepseekLM",
    "DeepseekModel",
    "Experts",
    "FP8Experts",
    "FP8Linear",
    "FixedStep",
    "LatentCache",
    "Linear",
    "LoadBalancer",
    "LoadHistory",
    "LoadReport",
    "MTPLayer",
    "MTPProbe",
    "MoE",
    "MultiHeadLatentAttention",
    "ParameterCount",
    "Placement",
    "Policy",
    "Precision",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "RoutingRecord",
    "Rule",
    "SpeculationReport",
    "StaticLatentCache",
    "UnsupportedModelError",
    "__version__",
    "convert",
    "count_parameters",
    "dequantize",
    "flops_per_token",
    "fp8_sensitivity",
    "fp8_training",
    "generate",
    "inspect_checkpoint",
    "keep_fp8",
    "kv_cache_bytes",
    "load",
    "plan_placement",
    "presets",
    "probe_mtp",
    "remove_fp8_training",
    "routing_agreement",
    "save",
    "slice_checkpoint",
    "weight_bytes",
]

__version__ = "0.1.0"

_EXPORTS = {
    "accounting": (
        "ParameterCount",
        "count_parameters",
        "flops_per_token",
        "kv_cache_bytes",
        "weight_bytes",
    ),
    "balance": (
        "BalanceLoss",
        "Capacity",
        "LoadBalancer",
    ),
    "cache": ("LatentCache",),
    "checkpoint": (
        "CheckpointError",
        "convert",
        "inspect_checkpoint",
        "load",
        "save",
        "slice_checkpoint",
    ),
    "config": (
        "ConfigError",
        "DeepseekConfig",
        "UnsupportedModelError",
        "presets",
    ),
    "fp8_linear": (
        "FP8Experts",
        "FP8Linear",
        "dequantize",
        "keep_fp8",
    ),
    "fp8_recipe": (
        "V3_RECIPE",
        "Policy",
        "Precision",
        "Rule",
        "fp8_sensitivity",
        "fp8_training",
        "remove_fp8_training",
    ),
    "decoding": ("FixedStep",),
    "generation": ("generate",),
    "linear": ("Linear",),
    "mla": ("MultiHeadLatentAttention",),
    "mlp": ("MLP",),
    "model": (
        "CausalLMOutput",
        "DecoderLayer",
        "DeepseekLM",
        "DeepseekModel",
    ),
    "moe": (
        "Experts",
        "MoE",
        "Router",
    ),
    "mtp": ("MTPLayer",),
    "norm": ("RMSNorm",),
    "probe": (
        "MTPProbe",
        "probe_mtp",
    ),
    "rope": ("RotaryEmbedding",),
    "routing": (
        "RoutingRecord",
        "routing_agreement",
    ),
    "speculative": ("SpeculationReport",),
    "static_cache": ("StaticLatentCache",),
    "telemetry": (
        "LoadHistory",
        "LoadReport",
        "Placement",
        "plan_placement",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
