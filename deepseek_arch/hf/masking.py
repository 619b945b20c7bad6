"""Attention masks: transformers' own, and packed sequences kept apart where its helper does not.

`create_causal_mask` separates packed sequences only without a 2D mask and without a cache. Here a sequence's start is
found from the positions alone, which also works when its tokens lie in a cache: a token at position p sees the last
p + 1 real tokens, itself included, whatever stands before them. Only a row that has padding among its cached tokens is
always taken for one sequence.

B batch, T queries of this call, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import is_tracing

__all__ = ["FirstTokens", "attention_mask_for", "document_starts", "real_tokens"]


def real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """bool [B, T], False for padding, of a mask [B, past + T]; None where nobody says, as with finished masks."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:] != 0


def document_starts(
    batch: int, tokens: int, past: int, cu_seq_lens: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Where each token's document starts, from what padding-free collators pass beside the tokens.

    Args:
        cu_seq_lens: [n + 1], ends of the documents in the flattened batch, from 0.
        seq_idx: [B, T], a number for each document.

    Returns:
        int64 [B, T], or None if neither is given.

    Raises:
        ValueError: tokens are cached already, whose documents are unknown.
    """
    if cu_seq_lens is None and seq_idx is None:
        return None
    if past:
        raise ValueError("expected cu_seq_lens_q and seq_idx without cached tokens, whose documents are unknown")
    if seq_idx is None:
        assert cu_seq_lens is not None
        flat = torch.arange(batch * tokens, device=cu_seq_lens.device)
        seq_idx = torch.searchsorted(cu_seq_lens.long(), flat, right=True).view(batch, tokens)
    index = torch.arange(tokens, device=seq_idx.device).expand(batch, tokens)
    starts = torch.ones_like(index, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.where(starts, index, 0).cummax(-1).values


def attention_mask_for(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    starts: Tensor | None = None,
) -> Tensor | None:
    """The mask for all layers of one call.

    Args:
        inputs_embeds: [B, T, H].
        attention_mask: None, [B, past + T] with zeros for padding, or a finished 4D mask, which is returned as it is.
        position_ids: [B or 1, T] if the caller gave them; positions that start again begin another sequence.
        starts: [B, T] of `document_starts`.

    Returns:
        None for plain causal attention; else bool or additive float [B, 1, T, S].
    """
    if attention_mask is None or attention_mask.ndim == 2:
        packed = _packed_mask(inputs_embeds, attention_mask, position_ids, cache, starts)
        if packed is not None:
            return packed
    # Positions stay out: what they say about packing has been looked at.
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=None,
    )


def _packed_mask(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    starts: Tensor | None,
) -> Tensor | None:
    """bool [B, 1, T, S] for packed rows, or None if every row is one sequence."""
    if position_ids is None and starts is None:
        return None
    batch, tokens = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past = cache.get_seq_length() if cache is not None else 0
    keys = cache.get_mask_sizes(tokens, 0)[0] if cache is not None else tokens
    index = torch.arange(tokens, device=device) + past  # [T], where the queries are among the keys
    if attention_mask is None:
        real = torch.ones(1, keys, dtype=torch.bool, device=device)
    else:
        real = attention_mask.to(device=device, dtype=torch.bool)[:, :keys]
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
    before = real.cumsum(-1) - real.long()  # [B, S], how many real keys stand before each key
    key_index = torch.arange(keys, device=device)
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    if position_ids is not None:
        # After a prompt padded on the right, generate's positions start again without meaning anything by it.
        gaps = (~real & (key_index < past)).any(-1, keepdim=True)
        first = (before[:, index] - position_ids.to(device)).masked_fill(gaps, 0)
    if starts is not None:
        first = torch.maximum(first, before.expand(batch, -1).gather(1, starts.to(device)))
    # first: [B, T], the number of real keys that a query must not see.
    if not is_tracing(inputs_embeds) and not bool(((first > 0) & real[:, index]).any()):
        return None
    allowed = (key_index <= index[:, None]) & real[:, None] & (before[:, None] >= first[:, :, None])
    return allowed[:, None].expand(batch, 1, tokens, keys)


class FirstTokens:
    """A static cache during its first call, cut to the tokens it has.

    transformers gives no mask then (plain causal attention is meant), yet the cache returns all of its slots.
    """

    def __init__(self, cache: Cache, tokens: int) -> None:
        self.cache, self.tokens = cache, tokens

    def update(self, latent: Tensor, rotated_key: Tensor, layer_idx: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        latents, keys = self.cache.update(latent, rotated_key, layer_idx, **kwargs)
        return latents[:, :, : self.tokens], keys[:, :, : self.tokens]
