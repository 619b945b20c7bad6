"""transformers' `generate(use_mtp=True)` on our own speculative decoding.

transformers' loader of MTP modules knows the tensor names of one depth, reads FP8 tensors as weights, and decodes one
row. Ours runs on the modules of the model itself, with any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..generation.entry import generate
from ..generation.shared_steps import many_ranks
from ..models.causal_lm import DeepseekLM

__all__ = ["core_of", "generate_with_drafts"]

# Settings that our decoding follows; any other that is set would be ignored.
_KNOWN = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "num_assistant_tokens",
    "pad_token_id",
    "return_dict_in_generate",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
    "use_mtp",
}


def core_of(model: Any) -> DeepseekLM:
    """Returns a `DeepseekLM` made of the modules of a `DeepseekForCausalLM`, without copying any."""
    core = DeepseekLM(model.config.to_core(), device="meta", dtype=model.dtype)
    main = model.model
    core.model.embed_tokens, core.model.layers, core.model.norm = main.embed_tokens, main.layers, main.norm
    core.model.rope, core.lm_head, core.mtp = main.rotary_emb, model.lm_head, model.mtp
    return core


@contextmanager
def _core_in_hooks(model: Any) -> Iterator[DeepseekLM]:
    """Yields `core_of` a model, whose passes run within the hooks of FSDP2 where it has wrapped the model.

    Those gather what belongs to the root: the head, the last norm, and perhaps the embedding.
    """
    core = core_of(model)
    if not many_ranks():
        yield core
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(model, FSDPModule):
        yield core
        return
    wrapped: Any = model
    wrapped._core_pass = core.forward
    register_fsdp_forward_method(wrapped, "_core_pass")
    core.forward = wrapped._core_pass  # type: ignore[method-assign]
    try:
        yield core
    finally:
        del wrapped._core_pass


def generate_with_drafts(model: Any, *args: Any, **kwargs: Any) -> Tensor | GenerateDecoderOnlyOutput:
    """Runs `generate` with drafts of the MTP modules; arguments as transformers' own.

    `num_assistant_tokens` is the number of tokens drafted at most (default 1). Without an attention mask, tokens that
    are `pad_token_id` are padding, unless that ends a text too. A `streamer` gets the prompts, and then every new
    column as soon as all rows have it.

    Returns:
        int64 [B, T + new], or with `return_dict_in_generate` an output whose `sequences` they are.

    Raises:
        ValueError: no input ids or no limit, or a setting that this way of decoding does not have.
    """
    if len(args) > 2:
        raise ValueError("expected at most inputs and generation_config by position with use_mtp=True, got more")
    given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    drafts = _drafts(given, model)
    inputs, streamer = given.pop("inputs", None), given.pop("streamer", None)
    config, rest = model._prepare_generation_config(given.pop("generation_config", None), **given)
    input_ids = rest.pop("input_ids", None) if inputs is None else inputs
    if input_ids is None:
        raise ValueError("expected input_ids with use_mtp=True, got none")
    mask = rest.pop("attention_mask", None)
    _check_settings(config, rest)
    new = config.max_new_tokens
    if new is None:
        if config.max_length is None:
            raise ValueError("expected max_new_tokens or max_length with use_mtp=True, got neither")
        new = max(0, config.max_length - input_ids.shape[1])
    samples = bool(config.do_sample)
    ends, pad = config.eos_token_id, config.pad_token_id
    ending = ends if isinstance(ends, list) else [ends]
    if mask is None and pad is not None and pad not in ending and bool((input_ids == pad).any()):
        mask = (input_ids != pad).long()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with torch.no_grad(), _core_in_hooks(model) as core:
        tokens = generate(
            core,
            input_ids,
            mask,
            new,
            mtp_depth=drafts,
            temperature=(1.0 if config.temperature is None else config.temperature) if samples else 0.0,
            top_k=(config.top_k or None) if samples else None,
            top_p=config.top_p if samples else None,
            eos_token_id=[end for end in ending if end is not None and end < model.config.vocab_size],
            pad_token_id=pad,
            callback=None if streamer is None else lambda column: streamer.put(column.cpu()),
        )
    if streamer is not None:
        streamer.end()
    assert isinstance(tokens, Tensor)
    return GenerateDecoderOnlyOutput(sequences=tokens) if config.return_dict_in_generate else tokens  # type: ignore[arg-type]


def _drafts(given: dict[str, Any], model: Any) -> int:
    """Returns the number of tokens to draft: the call's, else its generation config's, else the model's, else 1."""
    asked = given.get("num_assistant_tokens")
    for config in (given.get("generation_config"), model.generation_config):
        asked = getattr(config, "num_assistant_tokens", None) if asked is None else asked
    drafts = 1 if asked is None else asked
    if drafts < 1:
        raise ValueError(f"expected num_assistant_tokens >= 1 with use_mtp=True, got {drafts}")
    return drafts


def _check_settings(config: GenerationConfig, rest: dict[str, Any]) -> None:
    """Raises ValueError for settings, of the model or of this call, that would be ignored."""
    usual = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    other = {name for name, value in rest.items() if value is not None and value is not False and name != "use_cache"}
    other |= {
        name
        for name, value in config.to_dict().items()
        if name not in _KNOWN and not name.startswith("_") and value not in (None, False, usual.get(name))
    }
    if other:
        raise ValueError(
            f"expected only {', '.join(sorted(_KNOWN - {'transformers_version'}))}, a streamer and an attention mask "
            f"with use_mtp=True, got {', '.join(sorted(other))}"
        )
