"""Check of a cache that comes from outside: it has to hold latents."""

from __future__ import annotations

from typing import Any

import torch

from ..config.argument_types import shown

__all__ = ["check_holds_latents"]


def check_holds_latents(cache: Any, kv_lora_rank: int) -> None:
    """Checks what a cache already has in its first layer; an empty one, and one that hides its tensors, pass.

    Raises:
        ValueError: it is no cache, or there are keys of heads, as PEFT's prefix tuning puts them there.
    """
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ValueError(f"expected past_key_values to be a Cache of transformers, got {shown(cache)}")
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.dtype == torch.uint8:
        return
    heads, width = keys.shape[1], keys.shape[3]
    if keys.shape[2] and (heads, width) != (1, kv_lora_rank):
        raise ValueError(
            f"expected a cache of latents, [B, 1, S, {kv_lora_rank}], got keys [B, {heads}, S, {width}]: prefix tuning "
            "learns keys and values of heads, which latent attention does not cache; PEFT's prompt tuning and "
            "p-tuning learn virtual tokens for any model (PromptTuningConfig, PromptEncoderConfig)"
        )
