"""Steps of models with sparse attention, for `sparse_attention`: each in a process with a limit of memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import deepseek_arch as da

from ..core.machine import peak_memory, resident_memory
from ..core.workers import work
from .contestants import DTYPES, native_twin, random_ids, random_model

__all__ = ["perform"]


def perform(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Builds a model and measures its steps.

    Args:
        settings: "task" (decode or prompt), "who" (ours, "ours, dense" or transformers), "tokens", "config", "dtype",
            "threads", "repeats", "memory" (GB).
    """
    limit = int(settings["memory"] * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(settings["threads"])
    config, who = da.DeepseekConfig.from_dict(settings["config"]), settings["who"]
    if who == "ours, dense":
        sizes = dict.fromkeys(("index_topk", "index_n_heads", "index_head_dim"))
        config = config.replace(model_type="deepseek_v3", architectures=None, **sizes)
    model = random_model(config, DTYPES[settings["dtype"]])
    runs = _native if who == "transformers" else _ours
    step = runs(model, settings["task"], settings["tokens"])
    before = resident_memory()
    for _ in range(settings["repeats"]):
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            step()
        yield {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "before": before,
            "peak": peak_memory(),
        }


def _ours(model: da.DeepseekLM, task: str, tokens: int) -> Callable[[], object]:
    ids, config = random_ids(model.config.vocab_size, tokens, seed=1), model.config
    if task == "prompt":
        return lambda: model(ids, cache=model.new_cache(1, tokens), logits_to_keep=1)
    cache = model.new_cache(1, tokens + 8)
    for layer in range(config.num_hidden_layers):
        latents, index_keys = _states(config, tokens, model.dtype, layer)
        if config.has_indexer(layer):
            cache.update_indexer(index_keys, layer)
        cache.update_states(latents, layer)

    def step() -> None:
        model(ids[:, :1], cache=cache)
        cache.rewind(tokens)

    return step


def _native(model: da.DeepseekLM, task: str, tokens: int) -> Callable[[], object]:
    from transformers import DynamicCache

    twin: Any = native_twin(model)
    ids, config = random_ids(model.config.vocab_size, tokens, seed=1), model.config
    if task == "prompt":
        return lambda: twin(ids, use_cache=True, logits_to_keep=1)
    cache = DynamicCache(config=twin.config)
    for layer in range(config.num_hidden_layers):
        latents, index_keys = _states(config, tokens, model.dtype, layer)
        parts = latents[:, None].split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        cache.update(*parts, layer)
        cache.update_indexer(index_keys, layer)

    def step() -> None:
        twin(ids[:, :1], past_key_values=cache)
        cache.crop(-1)

    return step


def _states(config: da.DeepseekConfig, tokens: int, dtype: torch.dtype, layer: int) -> tuple[Tensor, Tensor]:
    """Returns random latents with rotated keys [1, T, C + R] and keys of the indexer [1, T, D]."""
    draw, width = torch.Generator().manual_seed(layer), config.index_head_dim or 1
    latents = torch.randn(1, tokens, config.latent_dim, generator=draw).to(dtype)
    return latents, torch.randn(1, tokens, width, generator=draw).to(dtype)


if __name__ == "__main__":
    work(perform)
