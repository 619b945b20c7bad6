"""The timed actions of both models: decoding, prefill, generation, a training step.

Ours runs on the backend `auto`, as for a user, and where the C++ operators are built also on the references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_kernels import use_backend
from deepseek_kernels.common.cpu import library_obstacle

from ..core.report import NATIVE, OURS
from .contestants import random_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "REFERENCE",
    "Action",
    "decode_actions",
    "generate_actions",
    "our_decode",
    "prefill_actions",
    "training_step",
    "with_reference",
]

Action = Callable[[], object]
REFERENCE = "ours, reference"


def with_reference(name: str, make: Callable[[], Action]) -> dict[str, Action]:
    """Returns an action of ours, and a second one on the references where they are not what the first one runs.

    Args:
        name: of the first one; the second is called "NAME, reference".
        make: builds the action, with a cache of its own.
    """
    actions = {name: make()}
    if library_obstacle(auto=True) is None:
        inner = make()

        def on_reference() -> None:
            with use_backend("reference"):
                inner()

        actions[f"{name}, reference"] = on_reference
    return actions


def _random_latents(config: da.DeepseekConfig, dtype: torch.dtype, batch: int, context: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
    latent, key = (torch.randn(1, 1, context, size, generator=generator).to(dtype) for size in sizes)
    return latent.expand(batch, -1, -1, -1), key.expand(batch, -1, -1, -1)


def our_decode(model: da.DeepseekLM, context: int, steps: int, batch: int = 1) -> Action:
    """Returns the decoding of one more token of each row by our model, on a cache of `context` random latents.

    Every call appends a token, for which there is room `steps` times.
    """
    cache = model.new_cache(batch, capacity=context + steps)
    latent, key = _random_latents(model.config, model.dtype, batch, context)
    for layer in range(model.config.num_hidden_layers):
        cache.update(latent, key, layer)
    token = random_ids(model.config.vocab_size, 1, seed=5, rows=batch)

    @torch.inference_mode()
    def step() -> None:
        model(token, cache=cache, logits_to_keep=1)

    return step


def _native_decode(twin: PreTrainedModel, model: da.DeepseekLM, context: int, batch: int) -> Action:
    from transformers import DynamicCache

    cache = DynamicCache(config=twin.config)
    latent, key = _random_latents(model.config, model.dtype, batch, context)
    for layer in range(model.config.num_hidden_layers):
        # Their cache holds keys de-interleaved (TRAPS A2), which makes no difference to the time.
        cache.update(latent, key, layer)
    token = random_ids(model.config.vocab_size, 1, seed=5, rows=batch)

    @torch.inference_mode()
    def step() -> None:
        twin(token, past_key_values=cache, logits_to_keep=1)

    return step


def decode_actions(
    model: da.DeepseekLM, twin: PreTrainedModel, context: int, steps: int, batch: int = 1
) -> dict[str, Action]:
    """Returns the decoding of one more token of each row by each contestant, on `context` random latents.

    Every call appends a token, for which there is room `steps` times.
    """
    ours = with_reference(OURS, lambda: our_decode(model, context, steps, batch))
    return ours | {NATIVE: _native_decode(twin, model, context, batch)}


def prefill_actions(model: da.DeepseekLM, twin: PreTrainedModel, tokens: int) -> dict[str, Action]:
    """Returns the prefill of a prompt into an empty cache by each contestant, with the logits of its last token."""
    ids = random_ids(model.config.vocab_size, tokens, seed=3)

    @torch.inference_mode()
    def ours() -> None:
        model(ids, cache=model.new_cache(1, capacity=tokens), logits_to_keep=1)

    @torch.inference_mode()
    def native() -> None:
        twin(ids, use_cache=True, logits_to_keep=1)

    return with_reference(OURS, lambda: ours) | {NATIVE: native}


def generate_actions(
    model: da.DeepseekLM, twin: PreTrainedModel, prompt: int, new: int, batch: int
) -> dict[str, Callable[[], Tensor]]:
    """Returns the greedy generation of `new` tokens behind random prompts; actions return [batch, prompt + new]."""
    ids = random_ids(model.config.vocab_size, prompt, seed=6, rows=batch)

    def ours() -> Tensor:
        return da.generate(model, ids, max_new_tokens=new, eos_token_id=[])

    def reference() -> Tensor:
        with use_backend("reference"):
            return ours()

    def native() -> Tensor:
        about = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return twin.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **about)

    built = library_obstacle(auto=True) is None
    return {OURS: ours, **({REFERENCE: reference} if built else {}), NATIVE: native}


def compiled_actions(
    names: tuple[str, str], model: da.DeepseekLM, prompt: int, new: int, batch: int
) -> dict[str, Callable[[], Tensor]]:
    """Returns the greedy generation of `new` tokens with a compiled step, and the same by plain steps."""
    ids = random_ids(model.config.vocab_size, prompt, seed=6, rows=batch)

    def generate(compiled: bool) -> Tensor:
        return da.generate(model, ids, max_new_tokens=new, eos_token_id=[], compiled=compiled)

    return {names[0]: lambda: generate(True), names[1]: lambda: generate(False)}


def training_step(model: Any, ids: Tensor) -> Tensor:
    """Runs forward, loss and backward, leaves the gradients, and returns the loss."""
    model.train()
    ours = isinstance(model, da.DeepseekLM)
    loss = model(ids, labels=ids, **({} if ours else {"use_cache": False})).loss
    loss.backward()
    return loss.detach()
