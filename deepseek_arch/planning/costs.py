"""FLOPs of one layer on one rank, and bytes it keeps for the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import ParallelLayout
from ..layout.published_tensors import Weight, layer_weights, mtp_weights
from .setup import TrainingSetup

__all__ = ["Work", "attention_flops", "deferred_bytes", "head_work", "kept_bytes", "layer_work", "working_bytes"]

# Projections that every rank of a tensor-parallel group computes whole.
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "gate", "wq_b", "wk", "weights_proj", "eh_proj")
# Logits are made and reduced in parts of so many tokens (as `linear_cross_entropy` does), in float32.
LOSS_ROWS = 1024


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of some layers on one rank, by the rate they run at.

    Attributes:
        products: matrix products that FP8 training runs in FP8; plain: those it leaves in BF16 (router, head, MTP's
            input projection, the indexer's weights); attention: scores and outputs.
        again: products of `products` that the selective policy computes a second time.
    """

    products: float = 0.0
    plain: float = 0.0
    attention: float = 0.0
    again: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.plain + other.plain,
            self.attention + other.attention,
            self.again + other.again,
        )


def attention_flops(config: DeepseekConfig, layer_idx: int, sequence: int) -> float:
    """Forward FLOPs of a layer's expanded causal attention a token, on average over `sequence` tokens."""
    c = config
    visible = sequence * (sequence + 1) // 2
    scored = 0
    if c.is_sparse_attention:
        short = min(sequence, c.index_topk or 0)
        scored, visible = visible, short * (short + 1) // 2 + (sequence - short) * short
    pairs = visible * 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    scored = scored if c.has_indexer(layer_idx) else 0
    pairs += scored * 2 * (c.index_n_heads or 0) * (c.index_head_dim or 0)
    return pairs / sequence


def layer_work(config: DeepseekConfig, layer_idx: int, layout: ParallelLayout, tokens: int, sequence: int) -> Work:
    """Forward FLOPs of decoder layer `layer_idx` on one rank for `tokens` of its tokens, experts evenly used."""
    weights: list[Weight] = list(layer_weights(config, layer_idx))
    if layer_idx >= config.num_hidden_layers:
        weights += [weight for weight in mtp_weights(config) if weight.part != "duplicate"]
    products = plain = again = 0.0
    for weight in weights:
        if len(weight.shape) != 2:
            continue
        module = weight.name.split(".")[-2]
        flops = 2.0 * tokens * math.prod(weight.shape)
        if weight.part == "experts":
            flops *= config.num_experts_per_tok or 0
        flops /= 1 if module in _WHOLE else layout.tp
        if weight.kind == "projection":
            products += flops
        else:
            plain += flops
        if module in ("q_b_proj", "kv_b_proj"):
            again += flops
    return Work(products, plain, tokens * attention_flops(config, layer_idx, sequence) / layout.tp, again)


def head_work(config: DeepseekConfig, layout: ParallelLayout, tokens: int) -> Work:
    """Forward FLOPs of the output head on one rank, once for the main model and once for each prediction layer."""
    uses = 1 + config.num_nextn_predict_layers
    return Work(plain=2.0 * tokens * config.vocab_size * config.hidden_size / layout.tp * uses)


# -------------------------------------------------------------------- activations


def kept_bytes(
    config: DeepseekConfig, layer_idx: int, layout: ParallelLayout, setup: TrainingSetup
) -> dict[str, float]:
    """Bytes that one micro-batch of decoder layer `layer_idx` leaves for its backward pass, by what they are.

    FP8 values count their scales (a float32 for 128). Routed rows are those of evenly used experts. Under the selective
    policy in FP8, the attention's output is kept in 12 bits (E5M6), as DeepSeek-V3 does (arXiv 2412.19437, 3.3.3).
    """
    c, fp8 = config, setup.precision == "fp8"
    tokens = setup.tokens(layout)
    value = 1 + 4 / 128 if fp8 else 2.0
    heads = c.num_attention_heads // layout.tp
    latents = (c.q_lora_rank or 0) + c.latent_dim
    out: dict[str, float] = {"layer input": 2 * c.hidden_size}
    if setup.recompute == "full":
        return {name: size * tokens for name, size in out.items()}
    out["latents"] = 2 * latents
    out["attention output"] = heads * c.v_head_dim * (1.5 if fp8 and setup.recompute == "selective" else 2)
    out["softmax sums"] = 4 * heads
    out["residual"] = 2 * c.hidden_size
    rows, width, shared = _mlp_sizes(c, layer_idx, layout)
    out["expert rows"] = value * rows * c.hidden_size
    out["gate and up"] = value * 2 * (rows * width + shared)
    if setup.recompute == "none":
        out["norm outputs"] = value * (2 * c.hidden_size + latents)
        out["queries, keys, values"] = 2 * heads * (2 * c.qk_head_dim + c.v_head_dim)
        out["attention output"] += value * heads * c.v_head_dim if fp8 else 0
        out["SwiGLU output"] = value * (rows * width + shared)
    if layer_idx >= c.num_hidden_layers:
        out["prediction input"] = 2 * 2 * c.hidden_size + 2 * c.hidden_size
    return {name: size * tokens for name, size in out.items()}


def deferred_bytes(config: DeepseekConfig, layer_idx: int, layout: ParallelLayout, setup: TrainingSetup) -> float:
    """Bytes that a layer holds between its gradients of inputs and of weights, beyond (or short of) `kept_bytes`.

    Weight gradients need every product's input and gradient; what only the gradients of inputs needed is released.
    """
    c, tokens = config, setup.tokens(layout)
    value = 1 + 4 / 128 if setup.precision == "fp8" else 2.0
    heads = c.num_attention_heads // layout.tp
    rows, width, shared = _mlp_sizes(c, layer_idx, layout)
    inputs: float = 2 * c.hidden_size + (c.q_lora_rank or 0) + c.kv_lora_rank + heads * c.v_head_dim
    inputs += rows * (c.hidden_size + width) + shared
    gradients: float = (c.q_lora_rank or 0) + c.latent_dim + c.hidden_size
    gradients += heads * (c.qk_head_dim + c.qk_nope_head_dim + c.v_head_dim)
    gradients += rows * (2 * width + c.hidden_size) + 2 * shared + (c.hidden_size if shared else 0)
    return value * tokens * (inputs + gradients) - sum(kept_bytes(c, layer_idx, layout, setup).values())


def _mlp_sizes(c: DeepseekConfig, layer_idx: int, layout: ParallelLayout) -> tuple[float, float, float]:
    """Returns routed rows a token, a routed expert's columns, and the columns that every token passes, on one rank.

    Ranks of a tensor-parallel group dispatch a part of their tokens each; every row goes to all `etp` ranks.
    """
    if not c.is_moe_layer(layer_idx):
        return 0.0, 0.0, c.intermediate_size / layout.tp
    width = c.moe_intermediate_size or 0
    rows = (c.num_experts_per_tok or 0) * layout.etp / layout.tp
    return rows, width / layout.etp, (c.n_shared_experts or 0) * width / layout.tp


def working_bytes(config: DeepseekConfig, layer_idx: int, layout: ParallelLayout, setup: TrainingSetup) -> float:
    """Bytes that the backward pass of a layer needs for a moment, in BF16: the larger block's, with overlapped passes
    both blocks'.

    Attention: queries, keys, values, the output, and a gradient of each. Experts or MLP: gradients of the rows that
    came and of those that go back, of gate and up, and SwiGLU's output computed again.
    """
    c, tokens = config, setup.tokens(layout)
    heads = c.num_attention_heads // layout.tp
    attention = 2 * tokens * heads * 2 * (2 * c.qk_head_dim + 2 * c.v_head_dim)
    rows, width, shared = _mlp_sizes(c, layer_idx, layout)
    mlp = 2 * tokens * max(rows * (2 * c.hidden_size + 3 * width), 2 * c.hidden_size + 3 * shared)
    again = sum(kept_bytes(c, layer_idx, layout, setup).values()) if setup.recompute == "full" else 0.0
    return again + (attention + mlp if setup.schedule in ("dualpipe", "dualpipev") else max(attention, mlp))
