"""Parameters, bytes and FLOPs of a model, from its config alone: nothing here allocates a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from .published_tensors import (
    DTYPE_BYTES,
    Weight,
    layer_weights,
    main_weights,
    mtp_weights,
    published_dtype,
    published_tensors,
    scale_shape,
)

__all__ = [
    "ParameterCount",
    "checkpoint_bytes",
    "count_parameters",
    "decode_flops_per_token",
    "expanded_cache_bytes",
    "flops_per_token",
    "indexer_cache_bytes",
    "kv_cache_bytes",
    "weight_bytes",
]


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Elements of a model's parameters, the routers' `e_score_correction_bias` included, FP8 scales not.

    Attributes:
        total: the main model, without multi-token prediction.
        activated: what one token uses: `total` less the experts a token is not sent to.
        activated_without_embedding: the same without the embedding (a lookup); the head is counted.
        activated_without_embedding_and_head: the same without either.
        total_without_embedding_and_head: the main model's layers and final norm.
        mtp: the MTP modules, without the embedding and head they share with the main model.
        mtp_stored: the same as published, with a copy of both in every layer.
        embedding, head, final_norm: the main model's tensors (a tied head has the embedding's size, counted once).
        attention: one layer's attention with its latent norms; indexer: the selection of keys beside it.
        layer_norms: the two norms of one layer.
        dense_mlp, expert, shared_experts, router: one layer's, one expert's; 0 where the model has none.
        indexers: decoder layers that have one.
        dense_layer, moe_layer: one whole decoder layer of each kind (the first); dense_layers, moe_layers: how many.
    """

    total: int
    activated: int
    activated_without_embedding: int
    activated_without_embedding_and_head: int
    total_without_embedding_and_head: int
    mtp: int
    mtp_stored: int
    embedding: int
    head: int
    final_norm: int
    attention: int
    indexer: int
    layer_norms: int
    dense_mlp: int
    expert: int
    shared_experts: int
    router: int
    dense_layer: int
    moe_layer: int
    dense_layers: int
    moe_layers: int
    indexers: int


def _elements(weights: Iterable[Weight], *parts: str) -> int:
    return sum(weight.elements for weight in weights if not parts or weight.part in parts)


def _kinds_of_layers(c: DeepseekConfig, layers: range) -> list[tuple[list[Weight], int]]:
    """Returns the weights of each kind of layer, and how many of `layers` are of it.

    Kinds are dense or with experts, each with or without an indexer. Layers of one kind are alike, so one of each
    tells all.
    """
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for layer_idx in layers:
        kinds.setdefault((c.is_moe_layer(layer_idx), c.has_indexer(layer_idx)), []).append(layer_idx)
    return [(list(layer_weights(c, members[0])), len(members)) for _, members in sorted(kinds.items())]


def _decoder_layers(c: DeepseekConfig) -> range:
    return range(c.num_hidden_layers)


def _mtp_layers(c: DeepseekConfig) -> range:
    return range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)


@check_types
def count_parameters(config: DeepseekConfig) -> ParameterCount:
    """Counts the parameters of `config`'s model, without building it.

    DeepSeek-V3: 671,026,419,200 in total, 37,552,297,472 activated, 11,610,068,224 for multi-token prediction.
    """
    c = config
    sparse = [c.is_moe_layer(layer_idx) for layer_idx in _decoder_layers(c)]
    dense = list(layer_weights(c, sparse.index(False))) if False in sparse else []
    moe = list(layer_weights(c, sparse.index(True))) if True in sparse else []
    expert = _elements(moe, "experts") // c.expert_sizes.routed if moe else 0
    idle_experts = sparse.count(True) * (c.expert_sizes.routed - c.expert_sizes.chosen) if moe else 0

    stack = sum(count * _elements(weights) for weights, count in _kinds_of_layers(c, _decoder_layers(c)))
    stack += c.hidden_size
    active_stack = stack - idle_experts * expert
    embedding = c.vocab_size * c.hidden_size
    embedding_and_head = embedding if c.tie_word_embeddings else 2 * embedding

    depths = c.num_nextn_predict_layers
    mtp_stored = depths * _elements(mtp_weights(c))
    mtp_stored += sum(count * _elements(weights) for weights, count in _kinds_of_layers(c, _mtp_layers(c)))
    return ParameterCount(
        total=stack + embedding_and_head,
        activated=active_stack + embedding_and_head,
        activated_without_embedding=active_stack + embedding,
        activated_without_embedding_and_head=active_stack,
        total_without_embedding_and_head=stack,
        mtp=mtp_stored - depths * _elements(mtp_weights(c), "duplicate"),
        mtp_stored=mtp_stored,
        embedding=embedding,
        head=embedding,
        final_norm=c.hidden_size,
        attention=_elements(moe or dense, "attention"),
        indexer=_elements(layer_weights(c, 0), "indexer"),
        layer_norms=_elements(moe or dense, "norms"),
        dense_mlp=_elements(dense, "dense_mlp"),
        expert=expert,
        shared_experts=_elements(moe, "shared_experts"),
        router=_elements(moe, "router"),
        dense_layer=_elements(dense),
        moe_layer=_elements(moe),
        dense_layers=sparse.count(False),
        moe_layers=sparse.count(True),
        indexers=len(c.indexer_layers),
    )


# ----------------------------------------------------------------------- bytes


def checkpoint_bytes(config: DeepseekConfig) -> int:
    """Payload bytes of the published safetensors of `config`; DeepSeek-V3: 688,574,839,360."""
    return sum(tensor.nbytes for tensor in published_tensors(config))


@check_types
def weight_bytes(config: DeepseekConfig, dtype: str = "bf16", *, mtp: bool = False) -> int:
    """Bytes of the model's weights in memory, nothing counted twice.

    Args:
        dtype: "bf16" or "fp32": all weights so; "fp8": as an FP8 checkpoint stores them, that is the projections as
            one byte a value plus a float32 scale a block, the rest as published. The routers'
            `e_score_correction_bias` is float32 always.
        mtp: with the MTP modules.

    Raises:
        ValueError: `dtype` is none of these.
    """
    if dtype not in ("bf16", "fp32", "fp8"):
        raise ValueError(f"expected dtype to be bf16, fp32 or fp8, got {dtype!r}")

    def size(weight: Weight) -> int:
        if dtype != "fp8":
            return weight.elements * (4 if dtype == "fp32" or weight.kind == "float32" else 2)
        stored = published_dtype(config, weight.kind, fp8=True)
        scales = math.prod(scale_shape(config, weight.shape)) * weight.copies if stored == "F8_E4M3" else 0
        return weight.elements * DTYPE_BYTES[stored] + 4 * scales

    total = sum(size(weight) for weight in main_weights(config))
    for weights, count in _kinds_of_layers(config, _decoder_layers(config)):
        total += count * sum(map(size, weights))
    if mtp:
        for weights, count in _kinds_of_layers(config, _mtp_layers(config)):
            total += count * sum(map(size, weights))
        beside = [weight for weight in mtp_weights(config) if weight.part != "duplicate"]
        total += config.num_nextn_predict_layers * sum(map(size, beside))
    return total


@check_types
def kv_cache_bytes(config: DeepseekConfig, tokens: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of the latent cache: `kv_lora_rank + qk_rope_head_dim` values per token and layer.

    Shared by all heads and by keys and values. DeepSeek-V3 in bfloat16: 70,272 bytes a token. Multi-token-prediction
    layers are not counted.
    """
    return config.latent_dim * config.num_hidden_layers * tokens * bytes_per_value


def expanded_cache_bytes(config: DeepseekConfig, tokens: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of a cache of every head's keys and values instead of the latents."""
    values = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return values * config.num_hidden_layers * tokens * bytes_per_value


def indexer_cache_bytes(config: DeepseekConfig, tokens: int = 1) -> int:
    """Bytes of the indexer's keys beside the latents: FP8 with a float32 scale per 128, of layers that have one."""
    if not config.is_sparse_attention:
        return 0
    width = config.indexer_sizes.head_dim
    return (width + 4 * -(-width // 128)) * len(config.indexer_layers) * tokens


# ----------------------------------------------------------------------- FLOPs


def _matmul_parameters(c: DeepseekConfig, weights: Iterable[Weight]) -> int:
    """Returns the elements that multiply a token: all matrices, of the routed experts only the chosen ones."""
    return sum(
        math.prod(weight.shape) * (c.expert_sizes.chosen if weight.part == "experts" else 1)
        for weight in weights
        if len(weight.shape) == 2
    )


def _linear_flops(c: DeepseekConfig, mtp: bool) -> int:
    """Returns the forward FLOPs of a token in everything but attention. The embedding is a lookup, not a product."""
    head = c.vocab_size * c.hidden_size
    kinds = _kinds_of_layers(c, _decoder_layers(c)) + (_kinds_of_layers(c, _mtp_layers(c)) if mtp else [])
    parameters = head + sum(count * _matmul_parameters(c, weights) for weights, count in kinds)
    if mtp:
        parameters += c.num_nextn_predict_layers * (2 * c.hidden_size**2 + head)
    return 2 * parameters


def _attention_layers(c: DeepseekConfig, mtp: bool) -> int:
    return c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)


@check_types
def flops_per_token(config: DeepseekConfig, context_length: int, *, training: bool = False, mtp: bool = False) -> int:
    """FLOPs of one token of a sequence of `context_length` tokens, on average over the sequence (causal attention).

    Twice the activated matrix parameters (the embedding lookup is no product), plus attention in its expanded form:
    `2 · heads · (qk_head_dim + v_head_dim)` per query and visible key. Training is three times the forward pass.
    Norms, activations and softmax are not counted. With V3.2's sparse attention, a query sees at most `index_topk`
    keys and the indexer scores all of them.

    DeepSeek-V3 trained at 4096: 250e9, as published (arXiv 2505.09343, table 2).

    Args:
        mtp: with the MTP modules (the published figure is without).

    Raises:
        ValueError: `context_length` is not positive.
    """
    c = config
    if context_length < 1:
        raise ValueError(f"expected context_length >= 1, got {context_length}")
    visible = context_length * (context_length + 1) // 2  # (query, key) pairs of the sequence
    scored = 0
    if c.is_sparse_attention:
        scored, short = visible, min(context_length, c.indexer_sizes.topk)
        visible = short * (short + 1) // 2 + (context_length - short) * c.indexer_sizes.topk
    pair_flops = visible * 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    pair_flops *= _attention_layers(c, mtp)
    indexers = len(c.indexer_layers) + _attention_layers(c, mtp) - c.num_hidden_layers
    pair_flops += indexers * scored * 2 * (c.index_n_heads or 0) * (c.index_head_dim or 0)
    forward = _linear_flops(c, mtp) + pair_flops // context_length
    return 3 * forward if training else forward


def decode_flops_per_token(config: DeepseekConfig, context_length: int) -> int:
    """FLOPs of generating one token against `context_length` keys in the latent cache.

    Attention is absorbed: scores over `kv_lora_rank + qk_rope_head_dim` and outputs over `kv_lora_rank` values per
    head and key, while `kv_b_proj`'s parameters are multiplied once with the queries and outputs, not with the keys.

    Raises:
        ValueError: `context_length` is not positive.
    """
    c = config
    if context_length < 1:
        raise ValueError(f"expected context_length >= 1, got {context_length}")
    visible = min(context_length, c.index_topk or context_length)
    attention = visible * 2 * c.num_attention_heads * (c.latent_dim + c.kv_lora_rank)
    scores = context_length * 2 * (c.index_n_heads or 0) * (c.index_head_dim or 0)
    return _linear_flops(c, mtp=False) + attention * c.num_hidden_layers + scores * len(c.indexer_layers)
