"""Format of config.json: names and defaults by model type, aliases, and the two ways of writing rotary embeddings.

Published files differ in what they leave out, and transformers 5 renames some fields when it writes them. Here all of
that becomes one set of fields; `DeepseekConfig` checks the values.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, UnsupportedModelError
from .families import ARCHITECTURES, MODEL_TYPES, V4
from .regular_file import identity_of, open_regular

__all__ = ["MOST_JSON", "parse_json", "read_fields", "read_text", "rope_type"]

MOST_JSON = 32 * 2**20  # bytes of a JSON file; published indices have up to 10 MB
_MOST_LAYERS = 10_000
_DEEPEST = 100  # nesting of arrays and objects

# Other names of the same thing: transformers 5 writes some of them, some third-party converters the others.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}
# Derived from other fields; a stale copy in a file must not win over `replace`.
_DERIVED = ("head_dim", "qk_head_dim", "mlp_layer_types", "layer_types")
_REQUIRED = (
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
# Fields that would change the computation, with the only values that this package computes with.
_ONLY = {
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "rope_interleave": (True, None),
    "use_mla": (
        True,
        None,
    ),  # false: ordinary attention, as in the language models of DeepSeek-VL2-tiny and DeepSeek-OCR
}


def read_text(file: Path) -> str:
    """Returns the text of a JSON file.

    Raises:
        ConfigError: the file is not UTF-8, or larger than any config.
        OSError: it cannot be opened, or is no regular file.
    """
    with open_regular(file) as stream:
        size = identity_of(stream.fileno()).size
        if size > MOST_JSON:
            raise ConfigError(f"{file}: expected JSON of at most {MOST_JSON:,} bytes, got {size:,}")
        data = stream.readall()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected JSON in UTF-8, got {error}") from None


def parse_json(text: str) -> dict[str, Any]:
    """Returns the JSON object in a text, every value of which can be computed with, shown and written back.

    Raises:
        ConfigError: the text is no JSON object, or has integers or nesting without measure.
    """
    try:
        data = json.loads(text, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise ConfigError(f"expected JSON, got {error}") from None
    except RecursionError:
        raise ConfigError(f"expected JSON nested at most {_DEEPEST} levels deep, got more") from None
    if not isinstance(data, dict):
        raise ConfigError(f"expected a JSON object, got {type(data).__name__}")
    level = [(key, value) for key, value in data.items()]
    for _ in range(_DEEPEST):
        for path, value in level:
            if isinstance(value, _LongInteger):
                raise ConfigError(f"expected {path} to be an integer of at most {_MOST_DIGITS} digits, got {value}")
        level = [inner for path, value in level for inner in _inside(path, value)]
        if not level:
            return data
    raise ConfigError(f"expected JSON nested at most {_DEEPEST} levels deep, got more in {level[0][0].split('.')[0]}")


_MOST_DIGITS = 4000  # Python refuses to read or show integers of more than 4300 digits


class _LongInteger(str):
    """An integer of too many digits, kept until the field that has it is known."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"one of {len(self)} digits"


def _parse_int(digits: str) -> int | _LongInteger:
    return int(digits) if len(digits) <= _MOST_DIGITS else _LongInteger(digits)


def _inside(path: str, value: Any) -> list[tuple[str, Any]]:
    """Returns the values in an object or an array, each with its path."""
    if isinstance(value, dict):
        return [(f"{path}.{key}", inner) for key, inner in value.items()]
    return [(path, inner) for inner in value] if isinstance(value, list) else []


def read_fields(data: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts the content of a config.json into values of `known` fields and everything else.

    Raises:
        UnsupportedModelError: the model type is none of this family.
        ConfigError: fields are missing, contradict each other, or ask for what no published model has.
    """
    data = dict(data)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        reason = f" ({V4})" if str(model_type).startswith("deepseek_v4") else ""
        raise UnsupportedModelError(
            f"expected model_type to be one of {', '.join(MODEL_TYPES)}, got {model_type!r}{reason}"
        )
    problems = _read_aliases(data)
    problems += [f"{name} is missing" for name in _REQUIRED if data.get(name) is None]
    if problems:
        raise ConfigError("; ".join(problems))
    for name, allowed in _ONLY.items():
        if not any(data.get(name) is one or data.get(name) == one for one in allowed):
            problems.append(f"expected {name} to be {allowed[0]}, got {data[name]!r}")
    _read_layer_types(data, problems)
    _read_indexer_types(data, problems)
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
    if values.get("architectures") in ([ARCHITECTURES[model_type]], (ARCHITECTURES[model_type],), []):
        del values["architectures"]  # `to_dict` writes it anyway
    extra = data.get("extra", {})
    if not isinstance(extra, Mapping):
        raise ConfigError(f"expected extra to be a mapping, got {extra!r}")
    extra = dict(extra) | {k: v for k, v in data.items() if k not in known and k != "extra"}
    return values, extra


def _read_aliases(data: dict[str, Any]) -> list[str]:
    """Replaces other names of a field by its own; returns the problems: names that contradict each other."""
    problems = []
    for alias, name in _ALIASES.items():
        value = data.pop(alias, None)
        if value is None:
            continue
        if data.get(name) is None:
            data[name] = value
        elif not _are_same(data[name], value):
            problems.append(f"expected {name} and {alias} to be the same, got {data[name]!r} and {value!r}")
    return problems


def _are_same(first: object, second: object) -> bool:
    """Returns True for equal values of one type, and for a dtype with and without "torch." before its name."""
    if isinstance(first, str) and isinstance(second, str):
        return first.removeprefix("torch.") == second.removeprefix("torch.")
    return type(first) is type(second) and first == second


def rope_type(rope_scaling: Mapping[str, Any]) -> Any:
    """Returns the kind of rotary scaling, under either of its names; "default" is none."""
    given = [rope_scaling[name] for name in ("rope_type", "type") if rope_scaling.get(name) is not None]
    return given[0] if given else "default"


def _read_layer_types(data: dict[str, Any], problems: list[str]) -> None:
    """transformers 5 writes GLM's dense prefix as a list with one word per layer."""
    kinds = data.get("mlp_layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list | tuple):
        problems.append(f"expected mlp_layer_types to be a list, got {kinds!r}")
        return
    dense = sum(kind == "dense" for kind in kinds)
    if list(kinds) != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        problems.append(
            f"expected mlp_layer_types to be dense layers followed by sparse ones, got {list(kinds)!r:.200}"
        )
    data.setdefault("first_k_dense_replace", dense)


def _read_indexer_types(data: dict[str, Any], problems: list[str]) -> None:
    """GLM-5 writes its layers that share a selection as a list, a pattern of letters, or a frequency and an offset."""
    if data.get("model_type") != "glm_moe_dsa" or data.get("indexer_types") is not None:
        return
    layers, pattern = data.get("num_hidden_layers"), data.get("index_topk_pattern")
    if isinstance(pattern, str):
        data["indexer_types"] = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
        return
    if isinstance(pattern, list | tuple):
        data["indexer_types"] = list(pattern)
        return
    frequency, offset = data.get("index_topk_freq"), data.get("index_skip_topk_offset")
    frequency, offset = 1 if frequency is None else frequency, 2 if offset is None else offset
    for name, value in (("index_topk_freq", frequency), ("index_skip_topk_offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_LAYERS:
            problems.append(f"expected {name} to be an integer from 0 to {_MOST_LAYERS}, got {value!r:.200}")
            return
    if frequency > 1 and isinstance(layers, int) and not isinstance(layers, bool) and 0 < layers <= _MOST_LAYERS:
        owns = (max(i - offset + 1, 0) % frequency == 0 for i in range(layers))
        data["indexer_types"] = ["full" if own else "shared" for own in owns]


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
        kinds = [parameters[kind] for kind in ("rope_type", "type") if parameters.get(kind) is not None]
        others = {key for key, value in parameters.items() if value is not None} - {"rope_type", "type"}
        if any(kind != "default" for kind in kinds) or (others and not kinds):
            scalings.append(parameters)
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    if any(theta != next(iter(given.values())) for theta in given.values()):
        problems.append(f"expected one rope_theta, got {given}")
    if given:
        data["rope_theta"] = next(iter(given.values()))
    first, *rest = [{**each, "type": rope_type(each), "rope_type": None} for each in scalings] or [{}]
    if any(other != first for other in rest):
        problems.append(f"expected rope_scaling and rope_parameters to be the same, got {scalings!r:.400}")
    data["rope_scaling"] = scalings[0] if scalings else None
