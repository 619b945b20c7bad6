"""Public entry of decoding: checks the arguments, and decodes plainly or with drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal_lm import DeepseekLM
from .arguments import check_arguments, check_prompts, end_tokens, padding_token
from .draft_length import DraftLength
from .plain import decode_plain
from .report import SpeculationReport
from .routing_rollout import check_recording
from .settings import GenerationSettings
from .shared_steps import SharedSteps, many_ranks
from .speculative import decode_with_drafts

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    mtp_depth: int = 0,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    callback: Callable[[Tensor], object] | None = None,
    prefill_chunk: int | None = None,
    cache_format: str | None = None,
    adaptive: bool | None = None,
    compiled: bool = False,
    drop_finished: bool = False,
    return_report: bool = False,
    return_logprobs: bool = False,
    record_routing: bool = False,
) -> Tensor | tuple[Tensor, SpeculationReport]:
    """Continues prompts.

    A model whose parameters are split over ranks is run by all of them together: each continues its own prompts, and
    those that are done go on making passes until all are.

    Args:
        input_ids: integers [B, T]; prompts of different length are padded, on the left or on the right.
        attention_mask: [B, T], nonzero for prompt tokens.
        max_new_tokens: tokens to add at most; prompt and new tokens together at most `max_position_embeddings` or
            2**20, whichever is more.
        mtp_depth: tokens to draft per step with the multi-token-prediction modules, at most; 0 for plain decoding.
            Beyond the number of modules the last one is applied again to its own output. Speed changes and nothing
            else: greedy tokens are those of plain decoding (but for ties within rounding), sampled ones are
            distributed alike.
        temperature: 0 takes the most probable token.
        top_k, top_p: restrict sampling to the best tokens.
        eos_token_id: tokens of the vocabulary that end a row; an empty list for none. Default: those of
            `model.generation_config` (the folder's generation_config.json), else the config's.
        pad_token_id: fills finished rows. Default: as for `eos_token_id`, else the first end token, else 0.
        seed: makes sampling repeatable; the global random state is neither used nor changed then.
        callback: called with the new tokens [B] of each step, as they come.
        prefill_chunk: tokens of the prompt to run at a time (default: all), to bound the memory of long prompts.
        cache_format: "fp8" for a cache of fewer bytes, see `DeepseekLM.new_cache`.
        adaptive: True lets the length of drafts follow the measured acceptance and times (on several ranks, the number
            of layers that a draft runs in place of times, so that all choose alike), up to `mtp_depth`; False
            drafts `mtp_depth`, but for a step in 64 without drafts, whose time the report needs. Default: True, except
            when sampling with a seed, since the tokens that are drawn depend on the length.
        compiled: fixes all work of a decoding step beforehand: as a CUDA graph on a GPU, with `torch.compile` and its
            C++ compiler elsewhere. Compiling takes half a minute or more, once in a process for each model, number of
            rows and 256 tokens of length, so that it pays for many tokens of a small model, whose steps are mostly
            Python; those of a large one are products, which stay what they are. For plain decoding.
        drop_finished: lets finished rows leave the batch, whose caches are compacted, instead of decoding on until the
            last row has ended. The tokens are the same (greedy ties within rounding aside), sampled ones too.
        return_report: returns a `SpeculationReport` as well.
        return_logprobs: returns a report as well, with the log-probability of each new token as its `logprobs`.
        record_routing: returns a report as well, with every routing decision of the main model as its `routing`: for
            all tokens that are returned, the last ones too, which are run for that. `model(tokens, routing.valid,
            replay_routing=routing)` takes the same decisions, if `pad_token_id` is in the vocabulary.

    Returns:
        int64 [B, T + new] token ids, prompt included. Shorter than T + max_new_tokens when every row has ended.

    Raises:
        ValueError: an argument has another type or is out of range, the model lacks what is asked for (MTP modules,
            experts), or its logits are not finite; nothing has been emitted for that step then. Or, before anything
            runs, a router's bias or an indexer's parameter is not finite, which would show in no logits. Ranks that run
            a model together raise alike, also what a `callback` of one raises.

    Warns:
        UserWarning: an end token of the folder's config is outside the vocabulary, and ends no text.
    """
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "mtp_depth": mtp_depth,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "pad_token_id": pad_token_id,
        "seed": seed,
        "callback": callback,
        "prefill_chunk": prefill_chunk,
        "cache_format": cache_format,
        "adaptive": adaptive,
        "compiled": compiled,
        "drop_finished": drop_finished,
        "return_report": return_report,
        "return_logprobs": return_logprobs,
        "record_routing": record_routing,
    }
    (input_ids, attention_mask), given, ends, padding, steps = _started(
        model, (input_ids, attention_mask), eos_token_id, arguments
    )
    seed, drafts = given["seed"], given["mtp_depth"]
    settings = GenerationSettings(
        given["max_new_tokens"],
        given["temperature"],
        given["top_k"],
        given["top_p"],
        ends,
        padding,
        steps.generator(seed, input_ids.device),
        callback,
        given["prefill_chunk"] or input_ids.shape[1],
        cache_format,
        compiled,
        drop_finished,
        record_routing,
        return_logprobs,
    )
    report = SpeculationReport(drafts)
    with _eval_mode(model):
        if not settings.new_tokens:
            new = input_ids[:, :0]
        elif drafts:
            adapt = (seed is None or settings.temperature == 0) if adaptive is None else adaptive
            # A draft is one decoder layer more, and the head again.
            cost = 1 / model.config.num_hidden_layers if many_ranks() else None
            length = DraftLength(drafts, adapt, cost)
            new = decode_with_drafts(model, input_ids, attention_mask, settings, length, report)
        else:
            new = decode_plain(model, input_ids, attention_mask, settings, report)
    tokens = torch.cat((input_ids, new), dim=1)
    return (tokens, report) if return_report or return_logprobs or record_routing else tokens


def _started(
    model: DeepseekLM,
    prompts: tuple[Tensor, Tensor | None],
    eos_token_id: int | Iterable[int] | None,
    arguments: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor | None], dict[str, Any], Tensor, int, SharedSteps]:
    """Checks what `generate` was given; ranks that share the passes of a model raise alike (TRAPS S4).

    Returns:
        Prompts and arguments as they are checked, the tokens that end a row, the padding, the shared steps.
    """
    if not isinstance(model, nn.Module):
        check_prompts(model, *prompts)  # which raises
    steps, error = SharedSteps(model), None
    given, ends, padding = dict(arguments), torch.empty(0, dtype=torch.int64), 0
    try:
        prompts = check_prompts(model, *prompts)
        given = check_arguments(model, prompts[0].shape[1], arguments)
        if given["record_routing"]:
            check_recording(model, given["max_new_tokens"], given["compiled"])
        if given["compiled"] and steps.shared:
            raise ValueError("expected compiled=False for a model that is split over ranks, got True")
        ends = end_tokens(model, eos_token_id, prompts[0].device)
        padding = padding_token(model, given["pad_token_id"], ends)
    except Exception as raised:
        error = raised
    alike = {} if error else {name: given[name] for name in ("mtp_depth", "record_routing")}
    alike |= {} if error else {"truth of max_new_tokens > 0": given["max_new_tokens"] > 0}
    steps.start(error, given["seed"], alike)
    steps.check_selection(model)
    return prompts, given, ends, padding, steps


@contextmanager
def _eval_mode(model: DeepseekLM) -> Iterator[None]:
    """Puts every module in eval mode, and back to the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
