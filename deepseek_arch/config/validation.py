"""Checks of a config: every field by itself, its type and range, then what must hold between fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .families import MODEL_TYPES
from .json_format import rope_type

if TYPE_CHECKING:
    from .deepseek_config import DeepseekConfig

__all__ = ["DTYPES", "HIDDEN_ACTS", "check_fields", "check_relations"]

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Those of `deepseek_kernels.common.activations`, which needs torch: the names of transformers, but for the two whose
# activations have parameters.
HIDDEN_ACTS = (
    "silu",
    "swish",
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "sqrtsoftplus",
    "tanh",
)

# Far above every model there is. They make sure that whatever is computed or listed from a config stays small: an
# element count fits into 64 bits, and a loop over layers or experts ends.
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000
_MOST_HEADS = 2**16
_WIDEST = 2**20
# Models compute in float32: these stay finite there, also squared or as an exponent's base.
_LARGEST_FLOAT = 1e15
_LEAST_TURNS, _LARGEST_SCALING = 1e-9, 1e9  # of rope_scaling

_INTEGERS: dict[str, tuple[int, int]] = {  # least and most
    "vocab_size": (1, _MOST),
    "hidden_size": (1, _WIDEST),
    "intermediate_size": (1, _WIDEST),
    "num_hidden_layers": (1, _MOST_LAYERS),
    "num_nextn_predict_layers": (0, _MOST_LAYERS),
    "num_attention_heads": (1, _MOST_HEADS),
    "num_key_value_heads": (1, _MOST_HEADS),
    "first_k_dense_replace": (0, _MOST),
    "moe_layer_freq": (1, _MOST),
    "kv_lora_rank": (1, _WIDEST),
    "qk_nope_head_dim": (1, _WIDEST),
    "qk_rope_head_dim": (1, _WIDEST),
    "v_head_dim": (1, _WIDEST),
    "max_position_embeddings": (1, _MOST),
}
_OPTIONAL_INTEGERS: dict[str, tuple[int, int]] = {
    "moe_intermediate_size": (1, _WIDEST),
    "n_shared_experts": (0, 1_000),
    "n_routed_experts": (1, _MOST_EXPERTS),
    "num_experts_per_tok": (1, _MOST_EXPERTS),
    "n_group": (1, _MOST_EXPERTS),
    "topk_group": (1, _MOST_EXPERTS),
    "q_lora_rank": (1, _WIDEST),
    "index_n_heads": (1, _MOST_HEADS),
    "index_head_dim": (1, _WIDEST),
    "index_topk": (1, _MOST),
    "bos_token_id": (0, _MOST),
    "pad_token_id": (-1, _MOST),
}
_FLOATS = (
    "rms_norm_eps",
    "latent_norm_eps",
    "rope_theta",
    "routed_scaling_factor",
    "initializer_range",
    "attention_dropout",
)
_OPTIONAL_FLOATS = ("aux_loss_alpha",)
_BOOLEANS = ("norm_topk_prob", "attention_bias", "tie_word_embeddings", "simulate_fp8")
_OPTIONAL_BOOLEANS = ("seq_aux", "indexer_rope_interleave")
_WORDS = {
    "model_type": tuple(MODEL_TYPES),
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "hidden_act": HIDDEN_ACTS,
    "mtp_input": ("post_norm", "pre_norm"),
    "mtp_chain": ("block", "head_norm"),
}
_INDEXER_TYPES = ("full", "shared")
_MAPPINGS = ("rope_scaling", "quantization_config", "extra")


def check_fields(values: Mapping[str, Any]) -> list[str]:
    """Returns the problems of the fields of a config, each by itself: its type and its range.

    Args:
        values: every field of `DeepseekConfig`, by name.
    """
    problems: list[str] = []
    integers = (_INTEGERS.items(), _OPTIONAL_INTEGERS.items())
    for optional, fields in zip((False, True), integers, strict=True):
        for name, (least, most) in fields:
            if not (optional and values[name] is None):
                problems += _check_integer(name, values[name], least, most)
    for name in (*_FLOATS, *_OPTIONAL_FLOATS):
        if name in _OPTIONAL_FLOATS and values[name] is None:
            continue
        if not _is_finite(values[name], 0):
            problems.append(f"expected {name} to be a finite number >= 0, got {_shown(values[name])}")
        elif values[name] > _LARGEST_FLOAT:
            problems.append(f"expected {name} to be a number <= {_LARGEST_FLOAT:g}, got {_shown(values[name])}")
    for name in (*_BOOLEANS, *_OPTIONAL_BOOLEANS):
        if not (name in _OPTIONAL_BOOLEANS and values[name] is None) and not isinstance(values[name], bool):
            problems.append(f"expected {name} to be true or false, got {_shown(values[name])}")
    for name, allowed in _WORDS.items():
        if not isinstance(values[name], str) or values[name] not in allowed:
            problems.append(f"expected {name} to be one of {', '.join(allowed)}, got {_shown(values[name])}")
    for name in _MAPPINGS:
        value = values[name]
        is_mapping = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        if not is_mapping and not (value is None and name != "extra"):
            problems.append(f"expected {name} to be a mapping from names, got {_shown(value)}")
    dtype = values["dtype"]
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        problems.append(f"expected dtype to be one of {', '.join(DTYPES)}, got {_shown(dtype)}")
    problems += _check_list("architectures", values["architectures"], "names", lambda one: isinstance(one, str))
    problems += _check_list("indexer_types", values["indexer_types"], "full and shared", _INDEXER_TYPES.__contains__)
    eos = values["eos_token_id"]
    if isinstance(eos, tuple):
        problems += _check_list("eos_token_id", eos, "token ids", lambda one: not _check_integer("", one, 0, _MOST))
    elif eos is not None:
        problems += _check_integer("eos_token_id", eos, 0, _MOST)
    return problems


def _check_integer(name: str, value: object, least: int, most: int) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return [f"expected {name} to be an integer >= {least}, got {_shown(value)}"]
    if value > most:
        return [f"expected {name} to be an integer <= {most}, got {_shown(value)}"]
    return []


def _check_list(name: str, value: object, what: str, is_valid: Callable[[object], bool]) -> list[str]:
    if value is None or (isinstance(value, tuple) and all(is_valid(one) for one in value)):
        return []
    return [f"expected {name} to be a list of {what}, got {_shown(value)}"]


def _is_finite(value: object, least: float) -> bool:
    """Returns True for an integer or a float that is finite as a float, and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and value >= least
    except OverflowError:
        return False


def _shown(value: object) -> str:
    """Returns a value as an error message shows it, on one line of bounded length."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**50:
        return f"an integer of {value.bit_length()} bits"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_relations(c: DeepseekConfig) -> list[str]:
    """Returns the problems between the fields of a config, each of which is valid by itself."""
    problems: list[str] = []
    if c.qk_rope_head_dim % 2:
        problems.append(f"expected an even qk_rope_head_dim (rotary pairs), got {c.qk_rope_head_dim}")
    if c.num_key_value_heads != c.num_attention_heads:
        problems.append(
            "expected num_key_value_heads to equal num_attention_heads (latent attention shares no heads), "
            f"got {c.num_key_value_heads} and {c.num_attention_heads}"
        )
    if c.n_routed_experts:
        problems += _check_routing(c)
    if c.rope_theta <= 1:
        problems.append(f"expected rope_theta > 1, got {c.rope_theta}")
    if not c.attention_dropout < 1:
        problems.append(f"expected attention_dropout in [0, 1), got {c.attention_dropout}")
    problems += _check_rope_scaling(c.rope_scaling)
    problems += _check_indexer(c)
    problems += _check_quantization(c.quantization_config or {})
    return problems


def _check_indexer(c: DeepseekConfig) -> list[str]:
    sizes, problems = (c.index_n_heads, c.index_head_dim, c.index_topk), []
    if any(v is None for v in sizes) != all(v is None for v in sizes):
        problems.append(f"expected all or none of index_n_heads, index_head_dim, index_topk, got {sizes}")
    types, width = c.indexer_types, c.index_head_dim
    if types is not None and len(types) != c.num_hidden_layers:
        problems.append(f"expected indexer_types for {c.num_hidden_layers} layers, got {len(types)}")
    if types and types[0] != "full":
        problems.append("expected the first of indexer_types to be full (it shares with a layer before), got shared")
    if width is None:
        if c.simulate_fp8 or types is not None:
            problems.append("expected index_topk with simulate_fp8 or indexer_types (of sparse attention), got null")
        return problems
    if c.q_lora_rank is None:
        problems.append("expected a q_lora_rank with an indexer (it reads the query latent), got null")
    if width < c.qk_rope_head_dim:
        problems.append(f"expected index_head_dim >= qk_rope_head_dim (which it rotates), got {width}")
    if c.simulate_fp8 and (width & (width - 1) or width > 128):
        problems.append(f"expected index_head_dim to be a power of two up to 128 with simulate_fp8, got {width}")
    return problems


def _check_quantization(quantization: Mapping[str, Any]) -> list[str]:
    method, blocks = quantization.get("quant_method"), quantization.get("weight_block_size")
    problems = []
    if method is not None and not isinstance(method, str):
        problems.append(f"expected quant_method to be a name, got {_shown(method)}")
    if method != "fp8":
        return problems
    if blocks is not None:
        valid = isinstance(blocks, list | tuple) and len(blocks) == 2
        if not valid or any(_check_integer("", size, 1, _WIDEST) for size in blocks):
            problems.append(f"expected weight_block_size to be two positive integers, got {_shown(blocks)}")
    if not isinstance(quantization.get("scale_fmt"), str | None):
        problems.append(f"expected scale_fmt to be a name, got {_shown(quantization['scale_fmt'])}")
    return problems


def _check_routing(c: DeepseekConfig) -> list[str]:
    if c.moe_intermediate_size is None or c.num_experts_per_tok is None:
        return [
            f"expected moe_intermediate_size and num_experts_per_tok beside n_routed_experts={c.n_routed_experts}, "
            f"got {c.moe_intermediate_size} and {c.num_experts_per_tok}"
        ]
    experts, problems = c.expert_sizes, []
    if (c.topk_method == "noaux_tc") != (c.scoring_func == "sigmoid"):
        problems.append(
            "expected noaux_tc with sigmoid scores, greedy or group_limited_greedy with softmax scores, "
            f"got topk_method {c.topk_method} with scoring_func {c.scoring_func}"
        )
    groups, kept = experts.groups, experts.kept_groups
    if experts.routed % groups:
        problems.append(f"expected n_routed_experts to be divisible by n_group, got {experts.routed} and {groups}")
        return problems
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
    return problems


def _check_rope_scaling(scaling: Mapping[str, Any] | None) -> list[str]:
    if scaling is None:
        return []
    kind = rope_type(scaling)
    if scaling.get("type") not in (None, kind):
        both = f"{_shown(kind)} and {_shown(scaling['type'])}"
        return [f"expected rope_type and type of rope_scaling to be the same, got {both}"]
    if kind not in ("default", "yarn", "linear", "dynamic"):
        return [f"expected rope_scaling of type yarn, linear, dynamic or default, got {_shown(kind)}"]
    if kind == "default":
        nameless = [key for key, value in scaling.items() if value is not None and "type" not in scaling]
        if nameless and "rope_type" not in scaling:
            return [f"expected rope_scaling with a rope_type, got {', '.join(nameless)!r:.200} without one"]
        return []
    problems, least = [], {"factor": 1, "original_max_position_embeddings": 1}
    of_yarn = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor") if kind == "yarn" else ()
    for name in (*of_yarn, *least):
        value: Any = scaling.get(name)
        bound = least.get(name, 0)
        if value is None and name != "factor":
            continue
        positive = name.startswith("beta")
        if not _is_finite(value, bound) or (positive and value == 0):
            relation, shown = ">" if positive else ">=", _shown(value)
            problems.append(f"expected rope_scaling[{name!r}] to be a finite number {relation} {bound}, got {shown}")
        elif value > _LARGEST_SCALING or (positive and value < _LEAST_TURNS):
            low = _LEAST_TURNS if positive else bound
            both = f"between {low:g} and {_LARGEST_SCALING:g}"
            problems.append(f"expected rope_scaling[{name!r}] to be a number {both}, got {_shown(value)}")
    if not isinstance(scaling.get("truncate", True), bool):
        problems.append(f"expected rope_scaling['truncate'] to be true or false, got {_shown(scaling['truncate'])}")
    return problems
