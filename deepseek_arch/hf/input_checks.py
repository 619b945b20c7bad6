"""Checks of what users pass to transformers' classes, as `DeepseekLM` checks it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..models.tensor_checks import (
    as_int64,
    check_dense,
    check_labels,
    check_multiplicative,
    check_token_ids,
    is_readable,
    nonzero,
)

__all__ = ["check_classes", "checked_ids", "checked_mask", "checked_positions", "checked_prompts", "vocabulary"]


def vocabulary(model: Any) -> int:
    """Returns the number of tokens that the embedding of a main model has, which a user may have replaced."""
    held = getattr(model.embed_tokens, "num_embeddings", 0)
    return max(model.config.vocab_size, held if isinstance(held, int) else 0)


def checked_ids(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
    """Returns the token ids [B, T] as integers that index, or None where embeddings [B, T, H] are given.

    Raises:
        ValueError: both or neither are given, a shape or dtype is wrong, or an id lies outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    weight = next(model.embed_tokens.parameters(), None)
    if input_ids is not None:
        return check_token_ids(input_ids, vocabulary(model), input_ids if weight is None else weight)
    check_dense("inputs_embeds", inputs_embeds, weight)
    assert inputs_embeds is not None
    width, dtype = model.config.hidden_size, inputs_embeds.dtype
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width or not inputs_embeds.shape[1]:
        raise ValueError(f"expected inputs_embeds [B, T, {width}] with T >= 1, got {list(inputs_embeds.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"expected inputs_embeds in floating point, got {dtype}")
    return None


def checked_mask(attention_mask: Any, x: Tensor, cache: Cache | None) -> Tensor | None:
    """Returns an attention mask of two dimensions, or a finished one of four.

    Args:
        x: [B, T, H], the embeddings.
        cache: the tokens before, which the mask covers too.

    Raises:
        ValueError: another number of dimensions, other rows or tokens; or one of two dimensions is additive.
    """
    if attention_mask is None:
        return None
    batch, tokens = x.shape[:2]
    check_dense("attention_mask", attention_mask, x)
    mask: Tensor = attention_mask
    if mask.ndim == 4:
        if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, tokens):
            raise ValueError(f"expected attention_mask [{batch}, 1, {tokens}, S], got {list(mask.shape)}")
        return mask
    # How many tokens another cache holds may be known to the device alone.
    past = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
    fits = mask.ndim == 2 and mask.shape[0] == batch
    known = cache is None or isinstance(cache, DynamicCache)
    if not fits or (mask.shape[1] != past + tokens if known else mask.shape[1] < tokens):
        raise ValueError(f"expected attention_mask [{batch}, {past + tokens}], got {list(mask.shape)}")
    if mask.is_floating_point() and is_readable(mask):
        check_multiplicative(mask)
    return nonzero(mask) if mask.dtype in (torch.uint16, torch.uint32, torch.uint64) else mask


def checked_positions(position_ids: Any, x: Tensor) -> Tensor | None:
    """Returns position ids [B or 1, T] as int64, or None.

    Raises:
        ValueError: they are no integers, or of another shape.
    """
    if position_ids is None:
        return None
    check_dense("position_ids", position_ids, x)
    batch, tokens = x.shape[:2]
    if tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"expected position_ids [{batch}, {tokens}], got {list(position_ids.shape)}")
    return as_int64("position_ids", position_ids)


def checked_prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of `generate` with prompts of any integer type as int64.

    Raises:
        ValueError: they are no integers [B, T] with values.
    """

    def checked(name: str, prompts: Any) -> Any:
        if prompts is None:
            return None
        check_dense(name, prompts, torch.empty(0, device="cpu"))
        if prompts.ndim != 2:
            raise ValueError(f"expected {name} [B, T], got {list(prompts.shape)}")
        return as_int64(name, prompts)

    prompts = {name: checked(name, kwargs[name]) for name in ("inputs", "input_ids") if name in kwargs}
    return (checked("inputs", args[0]), *args[1:]) if args else args, kwargs | prompts


def check_classes(labels: Any, config: Any) -> None:
    """Raises ValueError for labels of a classifier that are neither -100 nor a class.

    Labels in floating point are those of a regression, or of several classes at once.
    """
    if labels is None:
        return
    check_dense("labels", labels)
    single = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    if single and not labels.dtype.is_floating_point and is_readable(labels):
        check_labels(labels, None, config.num_labels)
