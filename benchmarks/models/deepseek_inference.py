"""DeepSeek's own inference code as a contestant, from a folder that the user brings along.

Nothing of it is here: `--deepseek-inference` names the folder `inference` of github.com/deepseek-ai/DeepSeek-V3, whose
model.py runs V2-Lite, V2 and V3. It works in a process of its own, because it sets globals and takes the module name
`kernel`; on our weights, under its names, nothing copied; and only where its logits are ours.

Its attention stays "absorb" and its caches are those it allocates itself, as published.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseek_arch as da

from ..core.report import Samples, interleave
from ..core.workers import Worker, work
from .contestants import DTYPES, allowed_difference, logit_differences, random_ids, random_model

__all__ = ["CHECKED", "NAME", "DeepseekInference", "arguments", "renamed", "unsupported"]

NAME = "DeepSeek's code"
CHECKED = 48  # tokens whose logits are compared
_LOAD_S = 900.0  # to draw billions of weights and to compare logits, on a slow disk and processor
_NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers": "layers",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn.wq",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_layernorm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attn.wkv_a",
    "self_attn.kv_a_layernorm": "attn.kv_norm",
    "self_attn.kv_b_proj": "attn.wkv_b",
    "self_attn.o_proj": "attn.wo",
    "mlp": "ffn",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "e_score_correction_bias": "bias",
}


# ------------------------------------------------------------------ what it can run, and under which names


def unsupported(config: da.DeepseekConfig) -> str | None:
    """Why its model.py computes something else than `config` asks for; None where it does not."""
    c, scaling = config, config.rope_scaling or {}
    sigmoid = c.scoring_func == "sigmoid"
    has_bias = c.hidden_size == 7168  # so says its Gate
    for wrong, why in (
        (c.index_topk is not None, "sparse attention"),
        (c.moe_layer_freq != 1, f"experts in every layer numbered by moe_layer_freq {c.moe_layer_freq}"),
        (not c.n_routed_experts or not c.n_shared_experts, "layers without routed or without shared experts"),
        (c.tie_word_embeddings or c.attention_bias, "tied embeddings or biases"),
        ({c.rms_norm_eps, c.latent_norm_eps} != {1e-6}, "norms with another epsilon than 1e-6"),
        (bool(c.norm_topk_prob) != sigmoid, f"norm_topk_prob {c.norm_topk_prob} with {c.scoring_func} scores"),
        (sigmoid and c.n_group > 1 and not has_bias, "groups by their two best scores, but where hidden_size is 7168"),
        (scaling.get("type", "yarn") != "yarn", f"rope scaling of type {scaling.get('type')!r}"),
        (len({scaling.get("mscale"), scaling.get("mscale_all_dim")}) > 1, "mscale unlike mscale_all_dim"),
        (bool(scaling) and "mscale" not in scaling, "rope scaling without mscale"),
    ):
        if wrong:
            return f"it has no {why}"
    return None


def arguments(config: da.DeepseekConfig, room: int) -> dict[str, Any]:
    """The fields of its `ModelArgs`, for one sequence of up to `room` tokens.

    It scales rotary frequencies only where the cache is longer than the original context: here it always is.

    Raises:
        ValueError: it cannot run this config.
    """
    if why := unsupported(config):
        raise ValueError(f"expected a config that DeepSeek's inference code runs, but {why}")
    c, scaling = config, config.rope_scaling
    fields: dict[str, Any] = {
        "max_batch_size": 1,
        "max_seq_len": room,
        "dtype": "bf16",
        "vocab_size": c.vocab_size,
        "dim": c.hidden_size,
        "inter_dim": c.intermediate_size,
        "moe_inter_dim": c.moe_intermediate_size,
        "n_layers": c.num_hidden_layers,
        "n_dense_layers": c.first_k_dense_replace,
        "n_heads": c.num_attention_heads,
        "n_routed_experts": c.n_routed_experts,
        "n_shared_experts": c.n_shared_experts,
        "n_activated_experts": c.num_experts_per_tok,
        "n_expert_groups": c.n_group,
        "n_limited_groups": c.topk_group,
        "score_func": c.scoring_func,
        "route_scale": c.routed_scaling_factor,
        "q_lora_rank": c.q_lora_rank or 0,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "rope_theta": c.rope_theta,
        "original_seq_len": room,
    }
    if scaling is None:
        return fields
    original = scaling["original_max_position_embeddings"]
    fields |= {"original_seq_len": original, "max_seq_len": max(room, original + 1), "rope_factor": scaling["factor"]}
    fields |= {"beta_fast": scaling.get("beta_fast", 32), "beta_slow": scaling.get("beta_slow", 1)}
    return fields | {"mscale": scaling.get("mscale_all_dim") or 0.0}


def renamed(state: Mapping[str, Tensor], with_bias: bool) -> dict[str, Tensor]:
    """Our state dict under its names: views of the same memory, the stacked experts one by one.

    Args:
        with_bias: whether its gate has one; ours, all zero in random models, is left out where not.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for ours, theirs in _NAMES.items():
            new = re.sub(rf"(^|(?<=\.)){re.escape(ours)}(?=\.|$)", theirs, new)
        prefix, stacked, _ = new.partition(".gate_up_proj")
        if stacked:
            for i, both in enumerate(tensor):
                found[f"{prefix}.{i}.w1.weight"], found[f"{prefix}.{i}.w3.weight"] = both.chunk(2)
        elif tensor.ndim == 3:
            prefix = new.removesuffix(".w2")
            found |= {f"{prefix}.{i}.w2.weight": one for i, one in enumerate(tensor)}
        elif with_bias or not new.endswith("gate.bias"):
            found[new] = tensor
    return found


# ------------------------------------------------------------------ the process that compares


class DeepseekInference:
    """The contestant, as the benchmark sees it.

    Raises:
        ValueError: the folder has no model.py, the config is none for it, or its logits are not ours.
    """

    def __init__(self, folder: str | Path, config: da.DeepseekConfig, dtype: str, threads: int, room: int) -> None:
        folder = Path(folder).resolve()
        if not (folder / "model.py").is_file():
            raise ValueError(f"expected DeepSeek's inference code, a folder with model.py, got {folder}")
        arguments(config, room)
        self._about = {"folder": str(folder), "config": config.to_dict(), "dtype": dtype, "threads": threads}
        self._about["room"] = room
        self._worker = Worker("benchmarks.models.deepseek_inference", Path(os.devnull))
        found = self._worker.perform({"do": "load", **self._about}, _LOAD_S)
        if "error" in found:
            self.close()
            raise ValueError(f"expected DeepSeek's inference code to run, got {found['error']}")
        self.notes = tuple(found["notes"])

    def decode(self, context: int, steps: int, warmup: int, budget_s: float, limit_s: float) -> Samples | str:
        """Seconds of each of `steps` tokens on a cache of `context`, or why there are none."""
        return self._time({"do": "decode", "context": context, "rounds": steps, "warmup": warmup}, budget_s, limit_s)

    def prefill(self, tokens: int, rounds: int, budget_s: float, limit_s: float) -> Samples | str:
        """Seconds of each prompt of `tokens`, or why there are none."""
        return self._time({"do": "prefill", "tokens": tokens, "rounds": rounds, "warmup": 1}, budget_s, limit_s)

    def _time(self, task: dict[str, Any], budget_s: float, limit_s: float) -> Samples | str:
        found = self._worker.perform({**task, "budget_s": budget_s, **self._about}, limit_s)
        return Samples(tuple(found["seconds"])) if "seconds" in found else f"{NAME}: {found['error']}"

    def close(self) -> None:
        """Ends the process, and frees what it holds."""
        self._worker.stop()


# ------------------------------------------------------------------ the process that has its modules

_LOADED: dict[str, Any] = {}


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """One task of `DeepseekInference`; loads first where an earlier process ended."""
    torch.set_num_threads(task["threads"])
    if not _LOADED:
        _LOADED.update(_load(task))
    theirs, dtype = _LOADED["model"], DTYPES[task["dtype"]]
    if task["do"] == "load":
        return {"notes": _LOADED["notes"]}
    with _default_dtype(dtype):
        if task["do"] == "decode":
            turns = iter(range(task["context"], task["context"] + task["rounds"] + task["warmup"]))
            _fill(theirs, task["context"])
            token = torch.tensor([[1]])
            action = lambda: theirs(token, next(turns))  # noqa: E731
        else:
            ids = random_ids(theirs.embed.vocab_size, task["tokens"], seed=3)
            action = lambda: theirs(ids, 0)  # noqa: E731
        found = interleave({NAME: action}, rounds=task["rounds"], warmup=task["warmup"], budget_s=task["budget_s"])
    return {"seconds": found[NAME].values}


def _load(task: dict[str, Any]) -> dict[str, Any]:
    """Its model on our weights, after a look at the logits of both."""
    config, dtype = da.DeepseekConfig.from_dict(task["config"]), DTYPES[task["dtype"]]
    folder = Path(task["folder"])
    stub = _import_kernel(folder)
    module = _import_file("model", folder / "model.py")
    ours = random_model(config, dtype)
    with _default_dtype(dtype):
        theirs = module.Transformer(module.ModelArgs(**arguments(config, task["room"]))).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), with_bias=config.hidden_size == 7168), assign=True)
    difference = _check(ours, theirs, dtype)
    digest = hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()[:12]
    attention = getattr(module, "attn_impl", "unknown")
    note = (
        f"{NAME}: model.py with SHA-256 {digest}..., attention {attention!r}, in its own process after the others; its "
        f"last logits differ from ours by {difference:.2g} (relative, {task['dtype']})"
    )
    return {"model": theirs, "notes": [note, *stub]}


def _check(ours: da.DeepseekLM, theirs: Any, dtype: torch.dtype) -> float:
    """The median difference of last logits, of prompts and of tokens after them: it returns no others.

    Raises:
        ValueError: it is larger than rounding explains.
    """
    ids = random_ids(ours.config.vocab_size, CHECKED, seed=1)
    with torch.inference_mode():
        right = ours(ids).logits[0]
        with _default_dtype(dtype):
            prompts = [(end, theirs(ids[:, :end], 0)[0]) for end in range(5, 41, 5)]  # the last one fills the cache
            steps = [(end, theirs(ids[:, end - 1 : end], end - 1)[0]) for end in range(41, CHECKED + 1)]
    medians = []
    for found in (prompts, steps):
        expected = torch.stack([right[end - 1] for end, _ in found])
        medians.append(float(logit_differences(torch.stack([logits for _, logits in found]), expected).median()))
    if not max(medians) <= allowed_difference(ours):
        raise ValueError(
            f"logits within {allowed_difference(ours):.2g} of ours expected, got {max(medians):.2g}: refusing to time "
            "different computations"
        )
    return max(medians)


def _fill(theirs: Any, context: int) -> None:
    """Random latents in its caches, as the others have."""
    generator = torch.Generator().manual_seed(2)
    for layer in theirs.layers:
        for cache in (layer.attn.kv_cache, layer.attn.pe_cache):
            cache[:, :context] = torch.randn(1, context, cache.shape[-1], generator=generator, dtype=torch.float32)


def _import_kernel(folder: Path) -> Sequence[str]:
    """Puts its module `kernel` where its model looks for it: a stand-in where it does not import.

    Only FP8 weights need what is in it. Returns a note where it is the stand-in.
    """
    try:
        _import_file("kernel", folder / "kernel.py")
    except Exception as error:  # whatever Triton says on a machine without a GPU
        stub = types.ModuleType("kernel")
        for name in ("act_quant", "weight_dequant", "fp8_gemm"):
            setattr(stub, name, _missing)
        sys.modules["kernel"] = stub
        return [f"{NAME}: its FP8 kernels, not needed here, do not import ({type(error).__name__})"]
    return ()


def _missing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("expected weights in 16 or 32 bits; the FP8 kernels did not import")


def _import_file(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """It creates norms, caches and masks in torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    work(perform, lambda: True)
