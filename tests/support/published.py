"""Published tensor names and shapes, from listings of the published files, and their conversion to a `DeepseekLM`'s.

Independent of `deepseek_arch.layout`, which is tested against it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from support import oracle


def shapes(config, mtp: bool = True, aliases: bool = True) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a published checkpoint of `config`, without FP8 scales.

    Args:
        mtp: with the MTP modules.
        aliases: with the MTP modules' copies of the embedding and the head.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    out = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (vocab, hidden)
    drafts = config.num_nextn_predict_layers if mtp else 0
    for layer in range(config.num_hidden_layers + drafts):
        prefix = f"model.layers.{layer}."
        out |= {prefix + name: shape for name, shape in _layer_shapes(config, layer).items()}
        if layer >= config.num_hidden_layers:
            out |= {prefix + f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
            out[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
            if aliases:
                out[prefix + "embed_tokens.weight"] = out[prefix + "shared_head.head.weight"] = (vocab, hidden)
    return out


def _layer_shapes(config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    qk = config.qk_nope_head_dim + config.qk_rope_head_dim
    linears: dict[str, tuple[int, ...]] = {
        "self_attn.kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        "self_attn.kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "self_attn.o_proj": (hidden, heads * config.v_head_dim),
        "self_attn.kv_a_layernorm": (config.kv_lora_rank,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if config.q_lora_rank is None:
        linears["self_attn.q_proj"] = (heads * qk, hidden)
    else:
        linears["self_attn.q_a_proj"] = (config.q_lora_rank, hidden)
        linears["self_attn.q_a_layernorm"] = (config.q_lora_rank,)
        linears["self_attn.q_b_proj"] = (heads * qk, config.q_lora_rank)

    extra: dict[str, tuple[int, ...]] = {}
    if oracle.has_indexer(config, layer):
        heads, width = config.index_n_heads, config.index_head_dim
        linears["self_attn.indexer.wq_b"] = (heads * width, config.q_lora_rank)
        linears["self_attn.indexer.wk"] = (width, hidden)
        linears["self_attn.indexer.k_norm"] = (width,)
        extra["self_attn.indexer.k_norm.bias"] = (width,)
        linears["self_attn.indexer.weights_proj"] = (heads, hidden)

    def mlp(prefix: str, width: int) -> None:
        linears[f"{prefix}.gate_proj"] = linears[f"{prefix}.up_proj"] = (width, hidden)
        linears[f"{prefix}.down_proj"] = (hidden, width)

    if oracle.is_moe(config, layer):
        linears["mlp.gate"] = (config.n_routed_experts, hidden)
        if config.topk_method == "noaux_tc":
            extra["mlp.gate.e_score_correction_bias"] = (config.n_routed_experts,)
        for expert in range(config.n_routed_experts):
            mlp(f"mlp.experts.{expert}", config.moe_intermediate_size)
        if config.n_shared_experts:
            mlp("mlp.shared_experts", config.n_shared_experts * config.moe_intermediate_size)
    else:
        mlp("mlp", config.intermediate_size)
    return {f"{name}.weight": shape for name, shape in linears.items()} | extra


def random_weights(config, seed: int = 0, bias_mean: float = 0.0) -> dict[str, Tensor]:
    """Returns float32 weights under which every part of the model affects the output.

    Activations have unit scale, norm weights differ from one, router scores are spread, and correction biases (mean
    `bias_mean`) change the chosen experts.
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, shape in shapes(config, aliases=False).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            out[name] = bias_mean + 0.2 * noise
        elif name.endswith("k_norm.bias"):
            out[name] = 0.3 * noise
        elif len(shape) == 1:
            out[name] = 1 + 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            out[name] = noise
        else:
            out[name] = noise * shape[1] ** -0.5 * (2 if name.endswith("gate.weight") else 1)
    return out


# ---------------------------------------------------------------- published names <-> DeepseekLM

_DRAFT = re.compile(r"mtp\.(\d+)\.(.*)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


def published_state(model) -> dict[str, Tensor]:
    """Returns a `DeepseekLM`'s tensors under published names: experts unstacked, MTP modules as the last layers."""
    return unstack(model.state_dict(), model.config)


def published_gradients(model) -> dict[str, Tensor | None]:
    """Returns the gradients of all parameters under published names; None for parameters without one."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    out: dict[str, Tensor | None] = {}
    out |= unstack({name: grad for name, grad in grads.items() if grad is not None}, model.config)
    return out | dict.fromkeys((name for name, grad in grads.items() if grad is None))


def unstack(state: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Returns a `DeepseekLM`'s tensors under published names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        draft = _DRAFT.fullmatch(name)
        if draft:
            name = f"model.layers.{config.num_hidden_layers + int(draft[1])}.{draft[2]}"
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                stem = f"{name.removesuffix('gate_up_proj')}{expert}."
                out[stem + "gate_proj.weight"], out[stem + "up_proj.weight"] = both.chunk(2)
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(tensor):
                out[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            out[name] = tensor
    return out


def stack(weights: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Returns the inverse of `unstack`, for a `DeepseekLM`'s `load_state_dict`."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer = _LAYER.fullmatch(name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            name = f"mtp.{int(layer[1]) - config.num_hidden_layers}.{layer[2]}"
        if ".mlp.experts." not in name:
            out[name] = tensor
    if config.tie_word_embeddings:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if not oracle.is_moe(config, layer):
            continue
        source = f"model.layers.{layer}.mlp.experts."
        draft = layer - config.num_hidden_layers
        target = source if draft < 0 else f"mtp.{draft}.mlp.experts."

        def every(kind: str, source: str = source) -> Tensor:
            return torch.stack([weights[f"{source}{e}.{kind}_proj.weight"] for e in range(config.n_routed_experts)])

        out[target + "gate_up_proj"] = torch.cat([every("gate"), every("up")], 1)
        out[target + "down_proj"] = every("down")
    return out
