"""Plain decoding: one token a step for every row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cache.latent_cache import LatentCache
from ..cache.static_cache import StaticLatentCache
from ..models.causal_lm import DeepseekLM
from .compiled_step import CompiledDecodeStep, fixed_capacity
from .finite_check import finite_at
from .report import SpeculationReport
from .routing_rollout import RolloutRouting, valid_tokens
from .sampling import token_logprobs
from .settings import GenerationSettings
from .shared_steps import SharedSteps

__all__ = ["decode_plain"]


def decode_plain(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: GenerationSettings,
    report: SpeculationReport,
) -> Tensor:
    """Continues prompts, one token a step; see `generate`.

    Returns:
        int64 [B, new], the new tokens.
    """
    (batch, prompt), device = input_ids.shape, input_ids.device
    cache = model.new_cache(batch, settings.capacity(prompt), format=settings.cache_format)
    sampler, check = settings.sampler(batch), settings.finite_check(model)
    routing = RolloutRouting() if settings.record_routing else None
    rows = torch.arange(batch, device=device)  # of the result, one for each row of the cache
    done = torch.zeros_like(rows, dtype=torch.bool)
    lengths = torch.full_like(rows, settings.new_tokens)  # new tokens up to a row's end, in the result
    running = batch
    columns, logprobs = _Columns(batch, settings.pad_token), _Columns(batch, 0.0)
    shared = SharedSteps(model)
    shared.check_prompts(0, [0] * -(-prompt // settings.prefill_chunk))
    logits = _prefill(model, input_ids, attention_mask, cache, settings.prefill_chunk, routing)
    step = _decode_step(model, cache, settings, prompt)
    while True:
        with shared.alone():
            # Every row's next token; a row that has ended gets padding.
            fresh, probabilities = sampler.choose(logits)
            check(finite_at(logits if probabilities is None else probabilities, fresh), ignored=done)
            ended_before = done if running < len(rows) else None
            columns.add(fresh, rows, ended_before)
            if settings.return_logprobs:
                logprobs.add(token_logprobs(logits, fresh, settings.temperature), rows, ended_before)
            if settings.callback is not None:
                settings.callback(columns.last())
            if len(settings.end_tokens):
                ending = (fresh[:, None] == settings.end_tokens).any(-1) & ~done
                if bool(ending.any()):
                    lengths[rows[ending]] = len(columns)
                    done = done | ending
                    running = len(rows) - int(done.sum())
            last = not running or len(columns) == settings.new_tokens
        ended = shared.all_done(last)
        # The pass that gives the logits of the token after; at the end for the sake of its routing alone. A row that
        # has ended goes on with what it sampled, since the padding token need not be in the vocabulary.
        if routing is not None:
            out = model(fresh[:, None], cache=cache, record_routing=True)
            routing.add(out.routing, rows, torch.tensor([prompt + len(columns) - 1], device=device))
            logits = out.logits[:, -1]
        elif not ended:
            logits = step(fresh)
        if last:
            while not ended:  # other ranks need this one in their passes
                ended = shared.all_done(True)
                if routing is not None or not ended:
                    step(fresh)
            break
        report.add_step(running, running, [], [], 0.0)
        keep = settings.rows_to_keep(done) if running < len(rows) else None
        if keep is not None:
            cache.reorder(keep)
            sampler.keep_rows(keep)
            rows, done, logits = rows[keep], done[keep], logits[keep]
    with shared.alone():
        check.look()
    shared.all_done(True)  # no rank returns where another raises
    if settings.return_logprobs:
        report.logprobs = logprobs.result()
    if routing is not None:
        report.routing = routing.record(valid_tokens(attention_mask, prompt, lengths.clamp(max=len(columns))))
    return columns.result()


class _Columns:
    """Columns that each step adds to its rows of the result, side by side.

    Args:
        batch: rows of the result.
        fill: value behind the end of a row.
    """

    def __init__(self, batch: int, fill: float) -> None:
        self.batch, self.fill = batch, fill
        self._parts: list[tuple[Tensor, list[Tensor]]] = []  # steps with the same rows
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, values: Tensor, rows: Tensor, ended: Tensor | None) -> None:
        """Adds values [R] of the rows `rows`, int64 [R]; None for `ended`, bool [R], where none has."""
        if not self._parts or self._parts[-1][0] is not rows:
            self._parts.append((rows, []))
        self._parts[-1][1].append(values if ended is None else values.masked_fill(ended, self.fill))
        self._count += 1

    def last(self) -> Tensor:
        """Returns the newest column, [batch]."""
        rows, values = self._parts[-1]
        return self._whole(rows, values[-1:])[:, 0]

    def result(self) -> Tensor:
        """Returns all columns, [batch, steps]."""
        return torch.cat([self._whole(rows, values) for rows, values in self._parts], dim=1)

    def _whole(self, rows: Tensor, values: list[Tensor]) -> Tensor:
        joined = torch.stack(values, 1)
        if len(rows) == self.batch:
            return joined
        return joined.new_full((self.batch, len(values)), self.fill).index_copy(0, rows, joined)


def _prefill(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: LatentCache,
    chunk: int,
    routing: RolloutRouting | None,
) -> Tensor:
    """Runs the prompts into the cache -> logits [B, vocab_size] of each row's last prompt token."""
    batch, prompt = input_ids.shape
    rows = torch.arange(batch, device=input_ids.device)
    last = torch.full_like(rows, prompt - 1)
    if attention_mask is not None:
        last = prompt - 1 - (attention_mask != 0).long().flip(-1).argmax(-1)
    logits = torch.empty(0)
    for start in range(0, prompt, chunk):
        ids = input_ids[:, start : start + chunk]
        mask = None if attention_mask is None else attention_mask[:, start : start + chunk]
        here = (last - start).clamp(0, ids.shape[1] - 1)[:, None]
        out = model(ids, mask, cache=cache, logits_to_keep=here, record_routing=routing is not None)
        logits = out.logits[:, 0] if start == 0 else torch.where((last >= start)[:, None], out.logits[:, 0], logits)
        if routing is not None:
            routing.add(out.routing, rows, torch.arange(start, start + ids.shape[1], device=ids.device))
    return logits


def _decode_step(
    model: DeepseekLM, cache: LatentCache, settings: GenerationSettings, prompt: int
) -> Callable[[Tensor], Tensor]:
    """Returns a function: tokens [R] -> logits [R, vocab_size] of the token after each."""
    if settings.compiled and settings.new_tokens > 1:
        return CompiledDecodeStep(model, StaticLatentCache(cache, fixed_capacity(prompt + settings.new_tokens)))
    return lambda tokens: model(tokens[:, None], cache=cache).logits[:, -1]
