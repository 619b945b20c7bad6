"""Attention masks: transformers' own, and packed sequences kept apart where its helper does not.

`create_causal_mask` separates packed sequences only without a 2D mask and without a cache. Here a sequence's start is
found from the positions alone, which also works when its tokens lie in a cache: a token at position p attends to the
last p + 1 real tokens, itself included, and to none before them. Only a row that has padding among its cached tokens is
always taken for one sequence.

B batch, T queries of this call, S keys.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import is_tracing

from ..models.tensor_checks import nonzero

__all__ = ["FirstTokens", "as_visibility", "attention_mask_for", "document_starts", "only_mask", "real_tokens"]


def only_mask(attention_mask: Any) -> Tensor | None:
    """Returns the mask in a table by kinds of layers, as generate makes it for a static cache, or what is no table."""
    if not isinstance(attention_mask, dict):
        return cast("Tensor | None", attention_mask)
    (mask,) = attention_mask.values()  # all layers of these models are of one kind
    return cast("Tensor | None", mask)


def real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Returns bool [B, T], False for padding, of a mask [B, past + T]; None without one, or with a finished mask."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return nonzero(attention_mask[:, -tokens:])


def document_starts(
    batch: int, tokens: int, past: int, cu_seq_lens: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """Returns the start of each token's document, by the arguments that padding-free collators pass beside the tokens.

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
    """Returns the mask for all layers of one call.

    Args:
        inputs_embeds: [B, T, H].
        attention_mask: None, [B, past + T] with zeros for padding, or a finished 4D mask, which is returned as it is.
        position_ids: [B or 1, T] if the caller gave them; positions that start again begin another sequence.
        starts: [B, T] of `document_starts`.

    Returns:
        None for plain causal attention; else a mask of `deepseek_kernels.common.masks`: spans where every row's real
        keys are neighbours, otherwise bool or additive float [B, 1, T, S].
    """
    if attention_mask is None or attention_mask.ndim == 2:
        first, real, index = _first_keys(inputs_embeds, attention_mask, position_ids, cache, starts)
        if is_tracing(inputs_embeds):
            if position_ids is not None or starts is not None:
                return _dense(first, real, index)
        elif not (attention_mask is None and position_ids is None and starts is None):
            packed, padded, interrupted = _kinds(first, real, index)
            if (packed or padded) and not interrupted:
                return _spans(first, real, index).expand(inputs_embeds.shape[0], -1, -1)
            if packed:
                return _dense(first, real, index)
    # Without the positions: their packing has been dealt with above.
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=None,
    )
    return cast("Tensor | None", mask)  # a BlockMask comes with flex attention alone, which these classes have not


def _first_keys(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first key that each query may attend to.

    Returns:
        int64 [B or 1, T or 1], the number of real keys at the beginning that a query does not attend to, 0 for padding;
        bool [B or 1, S], True for real keys; and int64 [T], the places of the queries among the keys.
    """
    batch, tokens = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past = cache.get_seq_length() if cache is not None else 0
    keys = cache.get_mask_sizes(tokens, 0)[0] if cache is not None else tokens
    index = torch.arange(tokens, device=device) + past
    if attention_mask is None:
        real = (torch.arange(keys, device=device) < past + tokens)[None]
    else:
        real = attention_mask.to(device=device, dtype=torch.bool)[:, :keys]
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))
    before = real.cumsum(-1) - real.long()  # [B, S], the number of real keys before each key
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    if position_ids is not None:
        # After a prompt padded on the right, generate's positions start again, which begins no sequence.
        gaps = (~real & (torch.arange(keys, device=device) < past)).any(-1, keepdim=True)
        first = (before[:, index] - position_ids.to(device)).masked_fill(gaps, 0)
    if starts is not None:
        first = torch.maximum(first, before.expand(batch, -1).gather(1, starts.to(device)))
    return first.clamp(min=0).masked_fill(~real[:, index], 0), real, index


def _kinds(first: Tensor, real: Tensor, index: Tensor) -> list[bool]:
    """Returns three flags: a row is packed, a token so far is padding, a row has padding between its real keys.

    All in one transfer, so that a GPU is waited for once.
    """
    so_far = torch.arange(real.shape[1], device=real.device) <= index[-1]
    begins = real.long().diff(dim=-1, prepend=torch.zeros_like(real[:, :1], dtype=torch.long)) > 0
    return torch.stack(((first > 0).any(), (so_far & ~real).any(), (begins.sum(-1) > 1).any())).tolist()


def _spans(first: Tensor, real: Tensor, index: Tensor) -> Tensor:
    """Returns the mask of `_dense` as spans, int32 [B, T, 2], for rows whose real keys are neighbours."""
    begin = real.long().argmax(-1, keepdim=True)
    end = torch.minimum(index + 1, begin + real.sum(-1, keepdim=True))  # [B, T]
    return torch.stack(torch.broadcast_tensors(begin + first, end), dim=-1).int()


def _dense(first: Tensor, real: Tensor, index: Tensor) -> Tensor:
    """Returns the mask as bool [B, 1, T, S]."""
    before = real.cumsum(-1) - real.long()
    allowed = torch.arange(real.shape[1], device=real.device) <= index[:, None]
    return (allowed & real[:, None] & (before[:, None] >= first[:, :, None]))[:, None]


class FirstTokens:
    """A static cache during its first call, cut to the tokens it has.

    transformers gives no mask then, for plain causal attention, yet the cache returns all of its slots.
    """

    def __init__(self, cache: Cache, tokens: int) -> None:
        self.cache, self.tokens = cache, tokens

    def update(self, latent: Tensor, rotated_key: Tensor, layer_idx: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        latents, keys = self.cache.update(latent, rotated_key, layer_idx, **kwargs)
        return latents[:, :, : self.tokens], keys[:, :, : self.tokens]

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        held: Tensor = self.cache.update_indexer(keys, layer_idx)
        return held[:, : self.tokens]


def as_visibility(mask: Tensor | None) -> Tensor | None:
    """Returns a mask for sparse attention, which selects among the keys that a query sees: never an additive one.

    Args:
        mask: as `attention_mask_for` returns it.

    Raises:
        ValueError: the additive mask weighs keys, with values other than 0 and those that hide a key.
    """
    if mask is None or not mask.is_floating_point():
        return mask
    seen = mask > torch.finfo(mask.dtype).min / 2
    if not is_tracing(mask) and bool((mask.masked_fill(~seen, 0) != 0).any()):
        raise ValueError("expected an additive mask of 0 and the least number with sparse attention, got other values")
    return seen
