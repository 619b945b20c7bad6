"""The tensors of a published checkpoint, from the config alone: names, shapes, dtypes.

One list of what a layer holds (`layer_weights`), from which sizes, FLOPs and checkpoint listings are all derived, so
that they cannot disagree with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..config.deepseek_config import DeepseekConfig

__all__ = [
    "DTYPE_BYTES",
    "TensorSpec",
    "Weight",
    "bands",
    "layer_weights",
    "main_weights",
    "model_weights",
    "mtp_weights",
    "published_dtype",
    "published_tensors",
    "scale_shape",
]


# Bytes of a value, by the dtype's name in a safetensors header.
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

_BAND_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a safetensors file, by what its header says; `dtype` is spelled as there: BF16, F32, F8_E4M3."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.itemsize


class Weight(NamedTuple):
    """A tensor that a layer has by its config, or `copies` equal ones (its experts)."""

    name: str  # below its layer; {expert} stands for the expert's number
    shape: tuple[int, ...]
    part: str
    kind: str = "plain"  # projection: FP8 in an FP8 checkpoint; norm; float32: never rounded; plain: all others
    copies: int = 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape) * self.copies


def _attention(c: DeepseekConfig) -> Iterator[Weight]:
    def projection(name: str, rows: int, columns: int, biased: bool = False) -> Iterator[Weight]:
        yield Weight(f"self_attn.{name}.weight", (rows, columns), "attention", "projection")
        if biased and c.attention_bias:
            yield Weight(f"self_attn.{name}.bias", (rows,), "attention")

    queries = c.num_attention_heads * c.qk_head_dim
    if c.q_lora_rank is None:
        yield from projection("q_proj", queries, c.hidden_size)
    else:
        yield from projection("q_a_proj", c.q_lora_rank, c.hidden_size, biased=True)
        yield Weight("self_attn.q_a_layernorm.weight", (c.q_lora_rank,), "attention", "norm")
        yield from projection("q_b_proj", queries, c.q_lora_rank)
    yield from projection("kv_a_proj_with_mqa", c.latent_dim, c.hidden_size, biased=True)
    yield Weight("self_attn.kv_a_layernorm.weight", (c.kv_lora_rank,), "attention", "norm")
    expanded = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield from projection("kv_b_proj", expanded, c.kv_lora_rank)
    yield from projection("o_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim, biased=True)


def _indexer(c: DeepseekConfig) -> Iterator[Weight]:
    """Yields the weights of sparse attention's selection of keys. Its key norm is a LayerNorm: weight and bias."""
    assert c.q_lora_rank is not None  # checked with the config: the indexer reads the query latent
    heads, width = c.indexer_sizes.heads, c.indexer_sizes.head_dim
    yield Weight("self_attn.indexer.wq_b.weight", (heads * width, c.q_lora_rank), "indexer", "projection")
    yield Weight("self_attn.indexer.wk.weight", (width, c.hidden_size), "indexer", "projection")
    yield Weight("self_attn.indexer.k_norm.weight", (width,), "indexer", "norm")
    yield Weight("self_attn.indexer.k_norm.bias", (width,), "indexer", "norm")
    yield Weight("self_attn.indexer.weights_proj.weight", (heads, c.hidden_size), "indexer")


def _mlp(c: DeepseekConfig, prefix: str, width: int, part: str, copies: int = 1) -> Iterator[Weight]:
    for name in ("gate_proj", "up_proj"):
        yield Weight(f"{prefix}.{name}.weight", (width, c.hidden_size), part, "projection", copies)
    yield Weight(f"{prefix}.down_proj.weight", (c.hidden_size, width), part, "projection", copies)


def _moe(c: DeepseekConfig) -> Iterator[Weight]:
    experts = c.expert_sizes
    yield Weight("mlp.gate.weight", (experts.routed, c.hidden_size), "router")
    if c.topk_method == "noaux_tc":
        yield Weight("mlp.gate.e_score_correction_bias", (experts.routed,), "router", "float32")
    yield from _mlp(c, "mlp.experts.{expert}", experts.width, "experts", experts.routed)
    if experts.shared_width:
        yield from _mlp(c, "mlp.shared_experts", experts.shared_width, "shared_experts")


def layer_weights(c: DeepseekConfig, layer_idx: int) -> Iterator[Weight]:
    """Yields the weights of a decoder layer, or of the decoder layer in an MTP module."""
    yield Weight("input_layernorm.weight", (c.hidden_size,), "norms", "norm")
    yield from _attention(c)
    if c.has_indexer(layer_idx):
        yield from _indexer(c)
    yield Weight("post_attention_layernorm.weight", (c.hidden_size,), "norms", "norm")
    if c.is_moe_layer(layer_idx):
        yield from _moe(c)
    else:
        yield from _mlp(c, "mlp", c.intermediate_size, "dense_mlp")


def mtp_weights(c: DeepseekConfig) -> Iterator[Weight]:
    """Yields the weights of an MTP module beside its decoder layer; `duplicate` parts are the main model's tensors."""
    yield Weight("embed_tokens.weight", (c.vocab_size, c.hidden_size), "duplicate")
    yield Weight("enorm.weight", (c.hidden_size,), "mtp", "norm")
    yield Weight("hnorm.weight", (c.hidden_size,), "mtp", "norm")
    yield Weight("eh_proj.weight", (c.hidden_size, 2 * c.hidden_size), "mtp")
    yield Weight("shared_head.norm.weight", (c.hidden_size,), "mtp", "norm")
    yield Weight("shared_head.head.weight", (c.vocab_size, c.hidden_size), "duplicate")


def main_weights(c: DeepseekConfig) -> Iterator[Weight]:
    """Yields embedding, final norm and head; a tied head is the embedding and is not stored."""
    yield Weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "embedding")
    yield Weight("model.norm.weight", (c.hidden_size,), "norms", "norm")
    if not c.tie_word_embeddings:
        yield Weight("lm_head.weight", (c.vocab_size, c.hidden_size), "head")


def model_weights(c: DeepseekConfig, mtp: bool) -> Iterator[Weight]:
    """Yields every tensor of the model once (without the MTP modules' duplicates)."""
    yield from main_weights(c)
    for layer_idx in range(c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)):
        yield from layer_weights(c, layer_idx)
        if layer_idx >= c.num_hidden_layers:
            yield from (weight for weight in mtp_weights(c) if weight.part != "duplicate")


def scale_shape(c: DeepseekConfig, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape of the scales: one float32 per block; blocks at the right and lower edge are partial."""
    rows, columns = c.weight_block_size or (128, 128)
    return -(-shape[0] // rows), -(-shape[1] // columns)


def published_dtype(c: DeepseekConfig, kind: str, fp8: bool) -> str:
    """Returns the dtype of a kind of weight in a published checkpoint, FP8 or not."""
    if kind == "projection" and fp8:
        return "F8_E4M3"
    # DeepSeek-V3.2 stores every norm in float32, the releases before it in bfloat16.
    if kind == "float32" or (kind == "norm" and c.model_type == "deepseek_v32"):
        return "F32"
    return "BF16"


def published_tensors(config: DeepseekConfig) -> Iterator[TensorSpec]:
    """Yields every tensor that a published checkpoint of `config` holds, FP8 scales and duplicates included.

    DeepSeek-V3: 91,991 tensors. Strays that loaders skip (Kimi-K2's rotary tables) are not among them.
    """
    c = config
    fp8 = c.weight_block_size is not None

    def stored(prefix: str, weight: Weight) -> Iterator[TensorSpec]:
        for expert in range(weight.copies):
            name = prefix + weight.name.replace("{expert}", str(expert))
            dtype = published_dtype(c, weight.kind, fp8)
            yield TensorSpec(name, dtype, weight.shape)
            if dtype == "F8_E4M3":
                yield TensorSpec(f"{name}_scale_inv", "F32", scale_shape(c, weight.shape))

    for weight in main_weights(c):
        yield from stored("", weight)
    for layer_idx in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        weights = [*layer_weights(c, layer_idx), *(mtp_weights(c) if layer_idx >= c.num_hidden_layers else ())]
        for weight in weights:
            yield from stored(f"model.layers.{layer_idx}.", weight)


def bands(first: int, end: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts rows into ranges of about 16 MiB that begin at multiples of `multiple`, the first at one before `first`."""
    step = max(1, _BAND_BYTES // max(1, row_bytes) // multiple) * multiple
    for start in range(first // multiple * multiple, end, step):
        yield start, min(start + step, end)
