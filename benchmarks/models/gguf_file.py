"""Writes a GGUF file of the benchmark's random tensors, so that llama.cpp computes what the other contestants compute.

Needs the package `gguf` (`pip install -e '.[benchmark]'`). Only what `random_model` builds is written: no vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

import deepseek_arch as da

from .contestants import comparable, random_model

__all__ = ["Settings", "gguf_tensors", "main", "write_gguf"]

ARCHITECTURE = "deepseek2"
# The number by which a file says what most of its tensors are.
FILE_TYPES = {"bf16": 32, "fp32": 0, "q8_0": 7}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model and format of the file; the same preset, layers and seed as of the command `model` give the same tensors.

    Raises:
        ValueError: layers that are not positive.
    """

    out: Annotated[str, "file to write"] = "model.gguf"
    preset: Annotated[str, "a preset name, a config.json or a checkpoint folder"] = "deepseek-v2-lite"
    layers: Annotated[int, "decoder layers to keep"] = 4
    type: Annotated[Literal["bf16", "fp32", "q8_0"], "of matrices; norms and the router are float32"] = "bf16"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"expected positive layers, got {self.layers}")


def main(settings: Settings) -> int:
    """Runs the command `gguf`."""
    s = settings
    config = comparable(da.DeepseekConfig.from_pretrained(s.preset)).replace(num_hidden_layers=s.layers)
    dtype = torch.float32 if s.type == "fp32" else torch.bfloat16
    write_gguf(random_model(config, dtype), s.out, s.type)
    print(f"wrote {s.out}: {Path(s.out).stat().st_size / 1e9:.2f} GB")
    return 0


def write_gguf(model: da.DeepseekLM, path: str | Path, kind: str) -> None:
    """Writes the tensors of `model` as matrices of `kind`: "bf16", "fp32" or "q8_0".

    Raises:
        ValueError: another kind, or a model that llama.cpp's architecture `deepseek2` does not describe.
    """
    if kind not in FILE_TYPES:
        raise ValueError(f"expected a kind among {', '.join(FILE_TYPES)}, got {kind!r}")
    _check(model.config)
    import gguf

    writer: Any = gguf.GGUFWriter(path, ARCHITECTURE)
    _describe(writer, gguf, model.config)
    writer.add_file_type(FILE_TYPES[kind])
    for name, tensor in gguf_tensors(model):
        _add(writer, gguf, name, tensor.detach().contiguous(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(c: da.DeepseekConfig) -> None:
    if c.rope_scaling is not None and c.yarn is None:
        raise ValueError(f"expected plain or YaRN rotation, got {dict(c.rope_scaling)}")
    if c.scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"expected softmax or sigmoid scores, got {c.scoring_func!r}")
    if c.tie_word_embeddings:
        raise ValueError("expected a head of its own, got tied embeddings")


def _describe(writer: Any, gguf: Any, c: da.DeepseekConfig) -> None:
    """Adds the architecture's sizes under the names that llama.cpp reads."""
    experts = c.expert_sizes
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)  # absorbed attention has one key for all heads
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    # llama.cpp knows models without a query latent by their number of layers, 27; to others 0 says it.
    writer.add_q_lora_rank(c.q_lora_rank or 0)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.latent_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_leading_dense_block_count(sum(not c.is_moe_layer(i) for i in range(c.num_hidden_layers)))
    writer.add_expert_count(experts.routed)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts or 0)
    writer.add_expert_feed_forward_length(experts.width)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(bool(c.norm_topk_prob))
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if c.scoring_func == "sigmoid" else gating.SOFTMAX)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if c.yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(c.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(c.yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_log_mul(0.1 * (c.yarn.mscale_all_dim or 0.0))


def gguf_tensors(model: da.DeepseekLM) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors under llama.cpp's names; the key half of kv_b_proj is transposed for absorbed attention."""
    state, c = model.state_dict(), model.config
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    yield "output.weight", state["lm_head.weight"]
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for name, tensor in _layer_tensors(c, parts):
            yield f"blk.{layer}.{name}", tensor


_RENAMED = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def _layer_tensors(c: da.DeepseekConfig, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts.items():
        if name == "self_attn.kv_b_proj.weight":
            heads = tensor.view(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
            yield "attn_k_b.weight", heads[:, : c.qk_nope_head_dim].transpose(1, 2)
            yield "attn_v_b.weight", heads[:, c.qk_nope_head_dim :]
        elif name == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield "ffn_gate_exps.weight", gate
            yield "ffn_up_exps.weight", up
        else:
            yield _RENAMED[name], tensor


def _add(writer: Any, gguf: Any, name: str, tensor: Tensor, kind: str) -> None:
    if tensor.ndim == 1 or "gate_inp" in name or kind == "fp32":
        writer.add_tensor(name, tensor.float().numpy())
    elif kind == "bf16":
        codes = tensor.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        quantized = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), quantized), raw_dtype=quantized)
