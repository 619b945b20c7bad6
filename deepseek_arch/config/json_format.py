"""What a config.json says: names and defaults by model type, aliases, and the two ways of writing rotary embeddings.

Published files differ in what they leave out, and transformers 5 renames some fields when it writes them. Here all of
that becomes one set of fields; `DeepseekConfig` checks the values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .errors import ConfigError, UnsupportedModelError
from .families import ARCHITECTURES, MODEL_TYPES, V4

__all__ = ["REQUIRED", "read_fields", "rope_type"]

# Other names of the same thing: transformers 5 writes some of them, some third-party converters the others.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}
# Derived from other fields; a stale copy in a file must not win over `replace`.
_DERIVED = ("head_dim", "qk_head_dim", "mlp_layer_types", "layer_types")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
)
_PUBLISHED_ONLY_OFF = {"mlp_bias": (False, None), "pretraining_tp": (1, None), "rope_interleave": (True, None)}


def read_fields(data: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts the content of a config.json into values of `known` fields and everything else.

    Raises:
        UnsupportedModelError: the model type is none of this family.
        ConfigError: fields are missing, contradict each other, or ask for what no published model has.
    """
    data = dict(data)
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        reason = f" ({V4})" if str(model_type).startswith("deepseek_v4") else ""
        raise UnsupportedModelError(
            f"expected model_type to be one of {', '.join(MODEL_TYPES)}, got {model_type!r}{reason}"
        )
    for alias, name in _ALIASES.items():
        value = data.pop(alias, None)
        if data.get(name) is None and value is not None:
            data[name] = value
    problems = [f"{name} is missing" for name in REQUIRED if data.get(name) is None]
    if problems:
        raise ConfigError("; ".join(problems))
    for name, allowed in _PUBLISHED_ONLY_OFF.items():
        if data.get(name, allowed[0]) not in allowed:
            problems.append(f"expected {name} to be {allowed[0]}, got {data[name]!r}")
    _read_layer_types(data, problems)
    _read_rope(data, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    for name in _DERIVED:
        data.pop(name, None)

    # A published file that is silent about a field means the family's neutral value, not V3's size.
    neutral: dict[str, Any] = {
        "moe_intermediate_size": None,
        "n_shared_experts": None,
        "n_routed_experts": None,
        "num_experts_per_tok": None,
        "n_group": None,
        "topk_group": None,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "dtype": None,
    }
    values = {**neutral, **MODEL_TYPES[model_type], **{k: v for k, v in data.items() if k in known}}
    for name in ("scoring_func", "topk_method", "norm_topk_prob"):
        if values[name] is None:
            values[name] = MODEL_TYPES[model_type][name]
    for name in ("moe_layer_freq", "num_nextn_predict_layers", "rope_theta", "first_k_dense_replace"):
        if values.get(name, 0) is None:
            del values[name]
    if list(values.get("architectures") or ()) == [ARCHITECTURES[model_type]]:
        del values["architectures"]  # what `to_dict` writes anyway
    extra = dict(data.get("extra", {})) | {k: v for k, v in data.items() if k not in known and k != "extra"}
    return values, extra


def rope_type(rope_scaling: Mapping[str, Any]) -> str:
    """The kind of rotary scaling, under either of its names; "default" is none."""
    return rope_scaling.get("rope_type") or rope_scaling.get("type") or "default"


def _read_layer_types(data: dict[str, Any], problems: list[str]) -> None:
    """transformers 5 writes GLM's dense prefix as a list with one word per layer."""
    kinds = data.get("mlp_layer_types")
    if not kinds:
        return
    dense = sum(kind == "dense" for kind in kinds)
    if list(kinds) != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        problems.append(f"expected mlp_layer_types to be dense layers followed by sparse ones, got {kinds}")
    data.setdefault("first_k_dense_replace", dense)


def _read_rope(data: dict[str, Any], problems: list[str]) -> None:
    """Turns transformers 5's `rope_parameters` into `rope_theta` and `rope_scaling`."""
    if data.get("partial_rotary_factor", 1.0) not in (1.0, None):
        problems.append(f"expected partial_rotary_factor 1.0, got {data['partial_rotary_factor']!r}")
    thetas = {"rope_theta": data.pop("rope_theta", None)}
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        parameters = data.pop(name, None)
        if parameters is None:
            continue
        if not isinstance(parameters, Mapping):
            problems.append(f"expected {name} to be a mapping, got {parameters!r}")
            continue
        parameters = dict(parameters)
        if parameters.pop("partial_rotary_factor", 1.0) not in (1.0, None):
            problems.append(f"expected partial_rotary_factor 1.0 in {name}")
        thetas[f"{name}.rope_theta"] = parameters.pop("rope_theta", None)
        if rope_type(parameters) != "default":
            scalings.append(parameters)
    said = {name: theta for name, theta in thetas.items() if theta is not None}
    if len(set(map(str, map(_as_float, said.values())))) > 1:
        problems.append(f"expected one rope_theta, got {said}")
    if said:
        data["rope_theta"] = next(iter(said.values()))
    data["rope_scaling"] = scalings[0] if scalings else None


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value
