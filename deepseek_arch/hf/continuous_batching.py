"""transformers' continuous batching on latents: pages whose two halves are the two halves of a token's latent and key.

Its paged cache holds keys and values of one width for every head. Latent attention caches a latent of C values and a
rotated key of R values for a token; side by side, and padded to an even number, they are cut into two halves, which
take the places of one head's key and value. Nothing is stored twice, and prefix sharing and offloading work on pages
as ever.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationMixin

__all__ = ["PagedGenerationMixin", "PagedLatents"]

_MOST_TOKENS = 2**15  # cached by default, in all requests together
_MOST_BATCH_TOKENS = 2**11  # of a step; its mask has a row for each, and a column for every cached token


class PagedLatents:
    """A paged cache of transformers as latent attention uses a cache.

    Args:
        pages: a `PagedAttentionCache` for one head of width (C + R) / 2, rounded up.
        step: the keyword arguments of this call of the model, which say where the tokens' pages are.
    """

    def __init__(self, pages: Any, step: dict[str, Any]) -> None:
        self.pages, self.step = pages, step

    def update(self, latent: Tensor, rotated_key: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Writes latents [1, 1, T, C] and keys [1, 1, T, R]; returns those of all S tokens of the step's requests."""
        rank, width = latent.shape[-1], latent.shape[-1] + rotated_key.shape[-1]
        joined = torch.nn.functional.pad(torch.cat((latent, rotated_key), dim=-1), (0, width % 2))
        first, second = joined.chunk(2, dim=-1)
        # The pages replace entries of the arguments by those of the layer's kind: each layer needs its own copy.
        halves = self.pages.update(first, second, layer_idx=layer_idx, kwargs=dict(self.step))
        states = torch.cat(halves, dim=-1)  # [1, 1, S, C + R]
        return states[..., :rank], states[..., rank:width]


class PagedGenerationMixin(GenerationMixin):
    """Generation with continuous batching, in a cache of bounded size, that fails loudly."""

    config: Any

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', with pages for latents, which are made here rather than in the manager's thread.

        Without `num_blocks` and `max_memory_percent` the cache has pages for the requests that the hints announce, up
        to 32768 tokens, or for one request where that is longer (transformers takes 60 to 90 % of the memory).

        Raises:
            ValueError: continuous batching cannot run this model, or not in this version of transformers.
            MemoryError: the cache does not fit into the memory.
        """
        self._check_pages(generation_config)
        own = getattr(generation_config or self.generation_config, "continuous_batching_config", None)
        wanted = own if continuous_batching_config is None else continuous_batching_config
        manager = cast(Any, super()).init_continuous_batching(
            generation_config=generation_config,
            continuous_batching_config=_bounded(wanted, workload_hints),
            workload_hints=workload_hints,
            **kwargs,
        )
        if manager.batch_processor is None:
            config = self.config
            self.config = _of_pages(config)  # of which the manager makes the cache
            try:
                manager.batch_processor = manager._create_batch_processor()
            finally:
                self.config = config
        return manager

    def continuous_batching_context_manager(self, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; see `init_continuous_batching`."""
        self._check_pages(generation_config)
        return cast(Any, super()).continuous_batching_context_manager(generation_config, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', except that no request fails in silence; see `init_continuous_batching`.

        Raises:
            ValueError: as `init_continuous_batching`, before anything runs.
            RuntimeError: a request failed; transformers logs it and returns it without tokens.
        """
        self._check_pages(generation_config)
        results = cast(Any, super()).generate_batch(inputs, generation_config, *args, **kwargs)
        failed = [f"{name}: {result.error}" for name, result in results.items() if result.error is not None]
        if failed or (inputs and not results):
            raise RuntimeError(f"expected tokens for {len(inputs)} requests, got errors ({'; '.join(failed[:1])})")
        return results

    def _check_pages(self, generation_config: Any) -> None:
        """Raises ValueError where continuous batching would fail later, or do something else than it is asked for."""
        problem, ranks = None, getattr(self, "tp_size", None) or 1
        if self.config.to_core().is_sparse_attention:
            problem = "sparse attention, whose indexer's keys transformers' paged cache has no place for"
        elif not _pages_take_halves():
            problem = "a version of transformers whose paged cache fits no latents (5.23 has one that does)"
        elif ranks > 1:
            problem = f"a model that is split over {ranks} ranks"
        elif getattr(generation_config or self.generation_config, "use_mtp", None):
            problem = "use_mtp=True, which it would ignore"
        if problem is not None:
            raise ValueError(
                f"expected generate, deepseek_arch.generate or a serving engine, got continuous batching with {problem}"
            )


def _pages_take_halves() -> bool:
    """Returns True if this version's paged cache takes and returns states by heads, [1, heads, T, width]."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    return "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


def _of_pages(config: Any) -> Any:
    """Returns a copy of a config with the sizes of the pages: one head, half as wide as a latent and its key."""
    pages = copy.deepcopy(config)
    pages.num_key_value_heads = 1
    pages.head_dim = math.ceil((config.kv_lora_rank + config.qk_rope_head_dim) / 2)
    pages.layer_types = ["full_attention"] * config.num_hidden_layers
    return pages


def _bounded(config: ContinuousBatchingConfig | None, hints: Any) -> ContinuousBatchingConfig:
    """Returns the settings of a user, or the default ones, with a size for the cache where they leave it open."""
    config = ContinuousBatchingConfig() if config is None else copy.deepcopy(config)
    if config.num_blocks is None and config.max_memory_percent is None:
        blocks = max(1, _MOST_TOKENS // config.page_size)
        longest = 0 if hints is None else hints.max_prompt_length + hints.max_generated_length
        if longest and hints.max_generated_length:
            each = math.ceil(longest / config.page_size) + 1  # one more for what is generated beside a shared prefix
            blocks = each * max(1, min(hints.num_requests, blocks // each))
        config.num_blocks = blocks
    if config.max_batch_tokens is None:
        config.max_batch_tokens = _MOST_BATCH_TOKENS
    return config
