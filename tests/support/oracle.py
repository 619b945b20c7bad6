"""An independent float64 implementation of the architecture, to test the real one against.

Written from the equations of the DeepSeek-V2 and -V3 reports and from the published tensor names alone: one document at
a time (so that padding and packing are trivially right), attention with expanded keys and values, rotary pairs as
complex numbers, routing and experts as Python loops over tokens. It shares nothing with `deepseek_arch` but the plain
fields of `DeepseekConfig`, and autograd differentiates all of it.

Weights are a dict of published tensor names (`model.layers.3.mlp.experts.7.gate_proj.weight`); T = tokens of one
document, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass
class Output:
    """Results of one document.

    Attributes:
        logits: [T, V].
        hidden: [T, H], after the final norm.
        mtp: per draft depth k = 1, 2, ... logits [T - k, V] whose row i predicts token i + k + 1.
        routes: per MoE layer, the chosen experts of every token.
        selected: per layer of a model with sparse attention, the keys of every query, ascending.
    """

    logits: Tensor
    hidden: Tensor
    mtp: list[Tensor] = field(default_factory=list)
    routes: dict[int, list[list[int]]] = field(default_factory=dict)
    selected: dict[int, list[list[int]]] = field(default_factory=dict)


def run(config, weights: Weights, tokens: Sequence[int], mtp_chain: str = "post_norm") -> Output:
    """Runs one document, positions 0, 1, ...

    Args:
        mtp_chain: the output of depth k that depth k + 1 reads, "post_norm" (after `shared_head.norm`) or "pre_norm":
            published models have one depth, so that no reference decides it.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    tokens = [int(t) for t in tokens]
    embedding = weights["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    out = Output(logits=torch.empty(0), hidden=torch.empty(0))

    x = embedding[tokens]
    for layer in range(config.num_hidden_layers):
        x = _decoder_layer(config, weights, layer, x, out)
    out.hidden = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    out.logits = out.hidden @ head.T

    # Depth k pairs the hidden state of token i with the embedding of token i + k; row i keeps position i.
    previous = out.hidden if config.mtp_input == "post_norm" else x
    for k in range(1, min(config.num_nextn_predict_layers, len(tokens) - 1) + 1):
        layer = config.num_hidden_layers + k - 1
        weight = lambda name, layer=layer: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
        embedded = _norm(embedding[tokens[k:]], weight("enorm"), config.rms_norm_eps)
        hidden = _norm(previous[: len(tokens) - k], weight("hnorm"), config.rms_norm_eps)
        # The published eh_proj reads the embedding first, the reverse of the V3 report's equation 21.
        block = _decoder_layer(config, weights, layer, torch.cat([embedded, hidden], -1) @ weight("eh_proj").T, out)
        normed = _norm(block, weight("shared_head.norm"), config.rms_norm_eps)
        out.mtp.append(normed @ head.T)
        previous = normed if mtp_chain == "post_norm" else block
    return out


def run_batch(config, weights: Weights, input_ids: Tensor, mask: Tensor | None = None, documents=None) -> Tensor:
    """Returns the logits [B, T, V] of a batch, zeros at padding.

    Args:
        mask: [B, T], zero at padding, left or right, which is removed before anything is computed.
        documents: lengths of the documents packed into every row; each runs alone.
    """
    batch, length = input_ids.shape
    mask = torch.ones_like(input_ids) if mask is None else mask
    logits = torch.zeros(batch, length, config.vocab_size, dtype=torch.float64)
    for row in range(batch):
        places = [t for t in range(length) if mask[row, t]]
        start = 0
        for size in documents or [len(places)]:
            where = places[start : start + size]
            logits = logits.index_put(
                (torch.tensor(row), torch.tensor(where)), run(config, weights, input_ids[row, where].tolist()).logits
            )
            start += size
        assert start == len(places), "documents must cover the row"
    return logits


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean of -log p(label of t + 1 | tokens up to t) over labels other than -100: [B, T, V], [B, T]."""
    terms = [
        -torch.log_softmax(logits[row, t], -1)[labels[row, t + 1]]
        for row in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    return torch.stack(terms).mean()


# ---------------------------------------------------------------- one layer


def _decoder_layer(config, weights: Weights, layer: int, x: Tensor, out: Output) -> Tensor:
    prefix = f"model.layers.{layer}."
    h = _norm(x, weights[prefix + "input_layernorm.weight"], config.rms_norm_eps)
    keys = None
    if config.index_topk is not None:
        own = has_indexer(config, layer)
        keys = select_keys(config, weights, prefix + "self_attn.", h) if own else out.selected[layer - 1]
        out.selected[layer] = keys
    x = x + attention(config, weights, prefix + "self_attn.", h, selected=keys)
    h = _norm(x, weights[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
    if not is_moe(config, layer):
        return x + _mlp(weights, prefix + "mlp.", h)
    y, out.routes[layer] = moe(config, weights, prefix + "mlp.", h)
    return x + y


def is_moe(config, layer: int) -> bool:
    """Returns True for every `moe_layer_freq`-th layer from `first_k_dense_replace` on, and for MTP modules.

    As in modeling_deepseek.py beside the published V2 and V3 checkpoints, and in V3's tensors for the MTP module.
    """
    if not config.n_routed_experts or layer < config.first_k_dense_replace:
        return False
    return layer >= config.num_hidden_layers or layer % config.moe_layer_freq == 0


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[name + ".weight"].T
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def _mlp(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    gate, up = _linear(weights, prefix + "gate_proj", x), _linear(weights, prefix + "up_proj", x)
    return _linear(weights, prefix + "down_proj", gate * torch.sigmoid(gate) * up)


# ---------------------------------------------------------------- attention, V2 report eqs. 9-19, 37-47


def rotary_frequencies(config) -> list[float]:
    """Returns the angle per position of each of the `qk_rope_head_dim / 2` pairs, with YaRN's blend of frequencies."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    yarn = _yarn(config)
    if yarn is None:
        return plain

    def pair_with(rotations: float) -> float:
        """Returns the (fractional) pair that rotates `rotations` times within the original context."""
        original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with(yarn.get("beta_slow") or 1)), dim - 1)
    width = (high - low) or 0.001
    ramps = [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]
    return [f * (1 - ramp) + f / yarn["factor"] * ramp for f, ramp in zip(plain, ramps, strict=True)]


def softmax_scale(config) -> float:
    """Returns `qk_head_dim ** -0.5`, times m(mscale_all_dim)² under YaRN."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = _yarn(config)
    return scale if yarn is None else scale * _m(yarn["factor"], yarn.get("mscale_all_dim") or 0) ** 2


def rotate(config, x: Tensor, positions: Tensor) -> Tensor:
    """Rotates interleaved pairs (x0, x1), (x2, x3), ... of [T, ..., R] by position times frequency."""
    yarn, amplitude = _yarn(config), 1.0
    if yarn is not None:
        amplitude = yarn.get("attention_factor")
        if amplitude is None:
            factor = yarn["factor"]
            amplitude = _m(factor, yarn.get("mscale") or 1) / _m(factor, yarn.get("mscale_all_dim") or 0)
    angles = positions.double()[:, None] * torch.tensor(rotary_frequencies(config), dtype=torch.float64)  # [T, R/2]
    turn = torch.polar(torch.full_like(angles, amplitude), angles)
    turn = turn.reshape(len(positions), *[1] * (x.dim() - 2), -1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def attention(
    config,
    weights: Weights,
    prefix: str,
    x: Tensor,
    positions: Tensor | None = None,
    selected: list[list[int]] | None = None,
    shown: list[Tensor] | None = None,
) -> Tensor:
    """Computes causal latent attention of one document, [T, H] -> [T, H], with the keys and values of every head.

    Args:
        selected: the keys that each query attends to, None for all before it and itself.
        shown: gets the weights [T, T] of every head.
    """
    tokens, heads = x.shape[0], config.num_attention_heads
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    eps = config.latent_norm_eps
    positions = torch.arange(tokens) if positions is None else positions

    if config.q_lora_rank is None:
        q = _linear(weights, prefix + "q_proj", x)
    else:
        latent = _linear(weights, prefix + "q_a_proj", x)
        q = _linear(weights, prefix + "q_b_proj", _norm(latent, weights[prefix + "q_a_layernorm.weight"], eps))
    q = q.view(tokens, heads, nope + rope)
    q = torch.cat([q[..., :nope], rotate(config, q[..., nope:], positions)], -1)

    down = _linear(weights, prefix + "kv_a_proj_with_mqa", x)
    shared_key = rotate(config, down[:, config.kv_lora_rank :], positions)  # one for all heads, not normed
    latent = _norm(down[:, : config.kv_lora_rank], weights[prefix + "kv_a_layernorm.weight"], eps)
    kv = _linear(weights, prefix + "kv_b_proj", latent).view(tokens, heads, nope + v_dim)

    outputs = []
    future = torch.ones(tokens, tokens).triu(1).bool()
    if selected is not None:
        future = torch.ones(tokens, tokens, dtype=torch.bool)
        for token, keys in enumerate(selected):
            future[token, keys] = False
    for head in range(heads):
        key = torch.cat([kv[:, head, :nope], shared_key], -1)
        scores = (q[:, head] @ key.T * softmax_scale(config)).masked_fill(future, -math.inf)
        outputs.append(torch.softmax(scores, -1) @ kv[:, head, nope:])
        if shown is not None:
            shown.append(torch.softmax(scores, -1))
    return _linear(weights, prefix + "o_proj", torch.cat(outputs, -1))


def has_indexer(config, layer: int) -> bool:
    """Returns True for every layer of V3.2, and for GLM-5's of type full; MTP modules have one of their own."""
    if config.index_topk is None:
        return False
    types = config.indexer_types
    return types is None or layer >= config.num_hidden_layers or types[layer] == "full"


def index_scores(config, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """Returns the lightning indexer's scores of every query (row) and key, [T, T], V3.2 report, equation 1."""
    tokens, heads, width, rope = x.shape[0], config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
    positions = torch.arange(tokens)

    def rotate_head(v: Tensor) -> Tensor:
        """Rotates the first R values; pairs are R / 2 apart, or neighbours in GLM-5."""
        turned = v[..., :rope]
        if not config.indexer_rope_interleave:
            turned = turned.unflatten(-1, (2, rope // 2)).transpose(-1, -2).flatten(-2)
        turned = rotate(config, turned, positions)
        if not config.indexer_rope_interleave:
            turned = turned.unflatten(-1, (rope // 2, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([turned, v[..., rope:]], -1)

    latent = _linear(weights, prefix + "q_a_proj", x)
    latent = _norm(latent, weights[prefix + "q_a_layernorm.weight"], config.latent_norm_eps)
    q = rotate_head(_linear(weights, prefix + "indexer.wq_b", latent).view(tokens, heads, width))
    key = x @ weights[prefix + "indexer.wk.weight"].T
    key = (key - key.mean(-1, keepdim=True)) / torch.sqrt(key.var(-1, unbiased=False, keepdim=True) + 1e-6)
    key = rotate_head(key * weights[prefix + "indexer.k_norm.weight"] + weights[prefix + "indexer.k_norm.bias"])
    w = _linear(weights, prefix + "indexer.weights_proj", x) * (heads * width) ** -0.5
    return torch.stack([(w[t][:, None] * (q[t] @ key.T).clamp(min=0)).sum(0) for t in range(tokens)])


def select_keys(config, weights: Weights, prefix: str, x: Tensor) -> list[list[int]]:
    """Returns the keys of every query: the best of those up to itself, of equal ones the first; ascending."""
    scores = index_scores(config, weights, prefix, x).detach()
    return [
        sorted(sorted(range(t + 1), key=lambda s, t=t: (-float(scores[t, s]), s))[: config.index_topk])
        for t in range(x.shape[0])
    ]


def _yarn(config) -> Mapping | None:
    scaling = config.rope_scaling
    kind = None if scaling is None else scaling.get("rope_type") or scaling.get("type")
    return scaling if kind == "yarn" else None


def _m(factor: float, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


# ---------------------------------------------------------------- experts, V3 report eqs. 12-16, V2 report eqs. 20-22


def moe(config, weights: Weights, prefix: str, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Computes routed experts times their weights plus unscaled shared experts: [T, H] -> [T, H], chosen experts."""
    rows, chosen = [], []
    for token in x:
        experts, gates = route(config, token, weights[prefix + "gate.weight"], _bias(weights, prefix))
        row = torch.zeros_like(token)
        for expert, gate in zip(experts, gates, strict=True):
            row = row + gate * _mlp(weights, f"{prefix}experts.{expert}.", token)
        rows.append(row)
        chosen.append(experts)
    y = torch.stack(rows)
    return (y + _mlp(weights, prefix + "shared_experts.", x) if config.n_shared_experts else y), chosen


def route(config, token: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[list[int], list[Tensor]]:
    """Returns the experts of one token, best first (smaller id first if equal), and the factors of their outputs."""
    count, top_k = config.n_routed_experts, config.num_experts_per_tok
    logits = weight @ token
    sigmoid = config.topk_method == "noaux_tc"
    scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
    choice = (scores + bias if bias is not None else scores).tolist()

    candidates = range(count)
    groups = 1 if config.topk_method == "greedy" else config.n_group or 1
    if groups > 1:
        size = count // groups
        # noaux_tc ranks a group by its two best biased scores, V2 by its best score.
        best = [sum(sorted(choice[g * size :][:size])[-2 if sigmoid else -1 :]) for g in range(groups)]
        chosen = sorted(range(groups), key=lambda g: (-best[g], g))[: config.topk_group]
        candidates = [e for e in range(count) if e // size in chosen]
    experts = sorted(candidates, key=lambda e: (-choice[e], e))[:top_k]

    gates = [scores[e] for e in experts]  # never the biased ones
    normalize = config.norm_topk_prob and (sigmoid or top_k > 1)
    if normalize:
        total = sum(gates) + 1e-20
        gates = [g / total for g in gates]
    if sigmoid or not normalize:  # V2's code either normalizes or scales
        gates = [g * config.routed_scaling_factor for g in gates]
    return experts, gates


def _bias(weights: Weights, prefix: str) -> Tensor | None:
    return weights.get(prefix + "gate.e_score_correction_bias")
