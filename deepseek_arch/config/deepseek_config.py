"""`DeepseekConfig`: one frozen, validated description of every multi-head-latent-attention model of the family.

Field names are those of the published `config.json` files. A config is read from a preset name, a `config.json`, a
checkpoint folder or a dict; whatever the file says beyond the fields below is kept in `extra` and written back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .argument_types import as_integer
from .errors import ConfigError, UnsupportedModelError
from .families import ARCHITECTURES, V4
from .json_format import parse_json, read_fields, read_text, rope_type
from .locations import explain_missing_config, explain_no_folder
from .presets import presets, read_preset
from .sizes import ExpertSizes, IndexerSizes
from .validation import check_fields, check_relations
from .yarn import Yarn

__all__ = ["ConfigError", "DeepseekConfig", "UnsupportedModelError", "Yarn", "presets", "read_config"]


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig:
    """A DeepSeek-family model: V2, V2-Lite, V3, R1, V3.1, V3.2, Kimi-K2, Moonlight, GLM-4.7-Flash, GLM-5.

    Construct it with keywords (defaults are DeepSeek-V3's), from a file with `from_pretrained`, or from a dict with
    `from_dict`; change it with `replace`. Everything is checked once, here; `ConfigError` lists all problems.

    Beyond the published fields:
        latent_norm_eps: epsilon of `q_a_layernorm` and `kv_a_layernorm`. The published code builds both with the
            class default 1e-6 whatever `rms_norm_eps` says.
        mtp_input: the hidden state that an MTP module reads: "post_norm" (after the main model's final norm:
            transformers, vLLM, SGLang) or "pre_norm" (torchtitan). The authors never settled it.
        mtp_chain: the hidden state that a further prediction depth reads from the one before: "head_norm" (after
            `shared_head.norm`: transformers, torchtitan, Megatron, SGLang, TensorRT-LLM, vLLM) or "block" (the block's
            output: V3 report). TRAPS F3.
        simulate_fp8: computes sparse attention as DeepSeek serves it: the indexer's queries and keys are rotated by a
            Hadamard matrix and quantized to FP8 (TRAPS G2), and latents are rounded to FP8 before they are cached, with
            power-of-two scales. Default: both in the model's dtype, and the indexer's scores in float32.
        extra: fields of the file that this class does not know, written back by `to_dict`.
    """

    model_type: str = "deepseek_v3"
    architectures: tuple[str, ...] | None = None
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int | None = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 1
    n_routed_experts: int | None = 256
    num_experts_per_tok: int | None = 8
    n_group: int | None = 8
    topk_group: int | None = 4
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    aux_loss_alpha: float | None = None
    seq_aux: bool | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    mtp_input: str = "post_norm"
    mtp_chain: str = "head_norm"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = "bfloat16"
    quantization_config: Mapping[str, Any] | None = None
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    indexer_types: tuple[str, ...] | None = None
    indexer_rope_interleave: bool | None = None
    simulate_fp8: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    # ---------------------------------------------------------------- reading

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> DeepseekConfig:
        """Reads a preset name (see `presets()`), a `config.json`, a checkpoint folder, or a dict.

        Raises:
            ConfigError: `source` is none of these, is not valid JSON, or describes no model of this family.
        """
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"expected a name, a path or a dict, got {type(source).__name__}")
        if not os.fspath(source):  # the working directory, to a path; a variable that is not set, to who wrote it
            raise ConfigError("expected a name, a path or a dict, got an empty string")
        text, origin = _text_of(source)
        return read_config(text, origin)[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeepseekConfig:
        """Reads the content of a published `config.json`, or of one that transformers 5 wrote.

        Accepts `rope_theta` + `rope_scaling` and the newer `rope_parameters`; fills `scoring_func` and `topk_method`
        from the model type where the file leaves them out.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a JSON object, got {type(data).__name__}")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        values, extra = read_fields(data, known)
        return cls(**values, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The published `config.json` layout: known fields under their published names, `extra` fields beside them.

        `from_dict(to_dict(c)) == c`. Fields that are None are left out, except `q_lora_rank` and `rope_scaling`,
        which readers expect to find.
        """
        out: dict[str, Any] = dict(self.extra)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "extra" or (value is None and f.name not in ("q_lora_rank", "rope_scaling")):
                continue
            if f.name in ("latent_norm_eps", "mtp_input", "mtp_chain", "simulate_fp8") and value == f.default:
                continue
            if f.name == "dtype":
                out["torch_dtype"] = value  # the key that every reader knows
                continue
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            out[f.name] = value
        out.setdefault("architectures", [ARCHITECTURES[self.model_type]])
        if self.model_type == "glm4_moe_lite":  # transformers reads the dense prefix of this model from here
            kinds = ("sparse" if self.is_moe_layer(i) else "dense" for i in range(self.num_hidden_layers))
            out["mlp_layer_types"] = list(kinds)
        return dict(sorted(out.items()))

    def replace(self, **changes: Any) -> DeepseekConfig:
        """A changed copy, validated again. Unknown field names raise `ConfigError`."""
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigError(f"expected fields of DeepseekConfig, got {', '.join(unknown)}")
        if "num_attention_heads" in changes:  # the two are always equal
            changes.setdefault("num_key_value_heads", None)
        if self.indexer_types is not None and "num_hidden_layers" in changes and "indexer_types" not in changes:
            layers = changes["num_hidden_layers"]  # the first so many; its own check says if there are none
            changes["indexer_types"] = self.indexer_types[:layers] if isinstance(layers, int) else self.indexer_types
        return dataclasses.replace(self, **changes)

    # ---------------------------------------------------------------- derived

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: `qk_nope_head_dim + qk_rope_head_dim`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: `kv_lora_rank + qk_rope_head_dim`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def yarn(self) -> Yarn | None:
        """The YaRN parameters of `rope_scaling`, or None for rotary embeddings that are plain or scaled otherwise."""
        if self.rope_scaling is None or rope_type(self.rope_scaling) != "yarn":
            return None
        names = {f.name for f in dataclasses.fields(Yarn)}
        values = {k: v for k, v in self.rope_scaling.items() if k in names and v is not None}
        values.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        return Yarn(**values)

    @property
    def softmax_scale(self) -> float:
        """`qk_head_dim ** -0.5`, times YaRN's `softmax_factor`; the same in the expanded and the absorbed form."""
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_factor if self.yarn else 1.0)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Returns True if layer `layer_idx` has experts; MTP modules count on from `num_hidden_layers`."""
        if type(layer_idx) is not int:
            layer_idx = as_integer("layer_idx", layer_idx)
        return (
            bool(self.n_routed_experts)
            and layer_idx >= self.first_k_dense_replace
            and (layer_idx >= self.num_hidden_layers or layer_idx % self.moe_layer_freq == 0)
        )

    @property
    def expert_sizes(self) -> ExpertSizes:
        """The sizes of the mixture of experts, as integers.

        Raises:
            ConfigError: the model has no routed experts.
        """
        routed, chosen, width = self.n_routed_experts, self.num_experts_per_tok, self.moe_intermediate_size
        if not routed or chosen is None or width is None:
            raise ConfigError(f"expected a model with routed experts, got n_routed_experts={routed}")
        grouped = self.topk_method != "greedy"
        groups, kept_groups = (self.n_group or 1, self.topk_group or 1) if grouped else (1, 1)
        return ExpertSizes(routed, chosen, width, (self.n_shared_experts or 0) * width, groups, kept_groups)

    @property
    def indexer_sizes(self) -> IndexerSizes:
        """The sizes of the indexer of sparse attention, as integers.

        Raises:
            ConfigError: the model has no indexer.
        """
        if self.index_n_heads is None or self.index_head_dim is None or self.index_topk is None:
            raise ConfigError(f"expected a model with an indexer, got index_topk={self.index_topk}")
        return IndexerSizes(self.index_n_heads, self.index_head_dim, self.index_topk)

    @property
    def is_sparse_attention(self) -> bool:
        """True if the model selects its keys with an indexer (V3.2, GLM-5)."""
        return self.index_topk is not None

    def has_indexer(self, layer_idx: int) -> bool:
        """Returns True if layer `layer_idx` selects keys itself; MTP modules count on from `num_hidden_layers`.

        False without sparse attention, and where a layer shares the selection of one before it (GLM-5).
        """
        if not self.is_sparse_attention:
            return False
        types = self.indexer_types
        return types is None or layer_idx >= len(types) or types[layer_idx] == "full"

    @property
    def indexer_layers(self) -> tuple[int, ...]:
        """The decoder layers that select keys themselves, without MTP modules."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.has_indexer(layer))

    @property
    def weight_block_size(self) -> tuple[int, int] | None:
        """(rows, columns) that share one FP8 scale, or None when the checkpoint is not FP8."""
        quantization = self.quantization_config
        if not quantization or quantization.get("quant_method") != "fp8":
            return None
        rows, columns = quantization.get("weight_block_size") or (128, 128)
        return rows, columns

    # ---------------------------------------------------------------- checks

    def __post_init__(self) -> None:
        changes: dict[str, Any] = {}
        if self.num_key_value_heads is None:
            changes["num_key_value_heads"] = self.num_attention_heads
        for name in ("architectures", "eos_token_id", "indexer_types"):
            if isinstance(getattr(self, name), list):
                changes[name] = tuple(getattr(self, name))
        types = changes.get("indexer_types", self.indexer_types)
        if isinstance(types, tuple) and len(types) == self.num_hidden_layers and set(types) == {"full"}:
            changes["indexer_types"] = None  # what it means
        for name in ("rope_scaling", "quantization_config", "extra"):
            if isinstance(getattr(self, name), Mapping):
                changes[name] = dict(getattr(self, name))
        if isinstance(self.dtype, str) or type(self.dtype).__module__ == "torch":  # without importing it
            changes["dtype"] = str(self.dtype).removeprefix("torch.")
        values = vars(self) | changes
        problems = check_fields(values)
        if problems:
            raise ConfigError("; ".join(problems))
        for f in dataclasses.fields(self):
            if f.type in ("float", "float | None") and values[f.name] is not None:
                changes[f.name] = float(values[f.name])  # 10000 and 10000.0 mean the same (TRAPS A10)
        for name, value in changes.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        problems = check_relations(self)
        if problems:
            raise ConfigError("; ".join(problems))


def read_config(text: str, origin: str) -> tuple[DeepseekConfig, dict[str, Any]]:
    """Returns the config that the text of a config.json describes, and the JSON object in it.

    Args:
        origin: of the text, for error messages.

    Raises:
        ConfigError: the text is not valid JSON, or describes no model of this family.
    """
    try:
        data = parse_json(text)
        return DeepseekConfig.from_dict(data), data
    except ConfigError as error:
        raise type(error)(f"{origin}: {error}") from None


def _text_of(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns the text of the config.json that `source` names, and its origin for error messages."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(explain_missing_config(path))
        path = path / "config.json"
    if path.is_file():
        return read_text(path), str(path)
    if str(source) in presets():
        return read_preset(str(source)), f"preset {source}"
    if str(source).startswith("deepseek-v4"):
        raise UnsupportedModelError(f"{source}: expected a model with latent attention; {V4}")
    raise ConfigError(
        f"expected a preset name, a config.json or a checkpoint folder, got {str(source)!r}"
        f"{explain_no_folder(source) or '; presets: ' + ', '.join(presets())}"
    )
