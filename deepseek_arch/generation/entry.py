"""Decoding: one token a step, or several with the multi-token-prediction layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.static_cache import StaticLatentCache
from ..models.causal_lm import DeepseekLM
from ..models.outputs import CausalLMOutput
from ..moe.routing_record import RoutingRecord
from .compiled_step import CompiledDecodeStep, fixed_capacity
from .drafter import Drafter, DraftLength
from .report import SpeculationReport
from .routing_rollout import check_recording, rollout_record
from .sampling import sample, sampling_probabilities
from .speculative import accept

__all__ = ["generate", "sample", "sampling_probabilities"]


@dataclass(frozen=True)
class _Job:
    """What to generate; see `generate`."""

    new: int
    temperature: float
    top_k: int | None
    top_p: float | None
    ends: Tensor
    pad: int
    generator: torch.Generator | None
    callback: Callable[[Tensor], None] | None
    chunk: int
    cache_format: str | None
    compiled: bool = False
    record: bool = False


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
    callback: Callable[[Tensor], None] | None = None,
    prefill_chunk: int | None = None,
    cache_format: str | None = None,
    adaptive: bool | None = None,
    compiled: bool = False,
    return_report: bool = False,
    record_routing: bool = False,
) -> Tensor | tuple[Tensor, SpeculationReport]:
    """Continues prompts.

    Args:
        input_ids: int [B, T]; prompts of different length are padded, on the left or on the right.
        attention_mask: [B, T], nonzero for prompt tokens.
        max_new_tokens: tokens to add at most.
        mtp_depth: tokens to draft per step with the multi-token-prediction layers, at most; 0 for plain decoding.
            Beyond the number of layers the last one is applied again to its own output. Speed changes and nothing
            else: greedy tokens are those of plain decoding (but for ties within rounding), sampled ones are
            distributed alike.
        temperature: 0 takes the most probable token.
        top_k, top_p: restrict sampling to the best tokens.
        eos_token_id: tokens that end a row (default: the config's; an empty list for none).
        pad_token_id: what a finished row is filled with (default: the config's, else its first end token).
        seed: makes sampling repeatable; the global random state is neither used nor changed then.
        callback: called with the new tokens [B] of each step, as they come.
        prefill_chunk: tokens of the prompt to run at a time (default: all), to bound the memory of long prompts.
        cache_format: "fp8" for a cache of fewer bytes, see `DeepseekLM.new_cache`.
        adaptive: whether the length of drafts follows the measured acceptance and times, up to `mtp_depth`, or is
            `mtp_depth`, but for a step in 64 without drafts, whose time the report needs. Default: it follows, except
            when sampling with a seed, since the tokens that are drawn depend on it.
        compiled: whether to fix all work of a decoding step beforehand: as a CUDA graph on a GPU, with `torch.compile`
            elsewhere, which takes a minute or more the first time. For plain decoding.
        return_report: also return a `SpeculationReport`.
        record_routing: also return a `SpeculationReport`, with every routing decision as its `routing`: for all tokens
            that are returned, the last ones too, which are run for that. `model(tokens, routing.valid,
            replay_routing=routing)` takes the same decisions, if `pad_token_id` is in the vocabulary. For plain
            decoding.

    Returns:
        int64 [B, T + new] token ids, prompt included. Shorter than T + max_new_tokens when every row has ended.

    Raises:
        ValueError: an argument is out of range, `mtp_depth` is not 0 and the model has no prediction layers, or routing
            is to be recorded of a model without experts.
    """
    _check(model, input_ids, attention_mask, max_new_tokens, mtp_depth, temperature, top_k, top_p, prefill_chunk)
    if compiled and mtp_depth:
        raise ValueError(f"expected mtp_depth 0 with compiled=True, got {mtp_depth}")
    if record_routing:
        check_recording(model, max_new_tokens, mtp_depth, compiled)
    ends = _end_tokens(model, eos_token_id, input_ids.device)
    pad = pad_token_id if pad_token_id is not None else model.config.pad_token_id
    pad = pad if pad is not None else (int(ends[0]) if len(ends) else 0)
    generator = None if seed is None else torch.Generator(device=input_ids.device).manual_seed(seed)
    chunk = prefill_chunk or input_ids.shape[1]
    job = _Job(
        max_new_tokens, temperature, top_k, top_p, ends, pad, generator, callback, chunk, cache_format, compiled,
        record_routing,
    )  # fmt: skip
    report = SpeculationReport(mtp_depth)
    with _evaluating(model):
        if max_new_tokens == 0:
            tokens = input_ids.long()
        elif mtp_depth:
            adapt = (seed is None or temperature == 0) if adaptive is None else adaptive
            tokens = _speculate(model, input_ids, attention_mask, job, DraftLength(mtp_depth, adapt), report)
        else:
            tokens = _decode(model, input_ids, attention_mask, job, report)
    return (tokens, report) if return_report or record_routing else tokens


@contextmanager
def _evaluating(model: DeepseekLM) -> Iterator[None]:
    """Every module in eval mode, and back to the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _decode(
    model: DeepseekLM, input_ids: Tensor, attention_mask: Tensor | None, job: _Job, report: SpeculationReport
) -> Tensor:
    """One token a step."""
    batch, prompt = input_ids.shape
    tokens = torch.full((batch, prompt + job.new), job.pad, dtype=torch.int64, device=input_ids.device)
    tokens[:, :prompt] = input_ids
    cache = model.new_cache(batch, prompt + job.new, format=job.cache_format)
    records: list[RoutingRecord] | None = [] if job.record else None
    logits = _prefill(model, input_ids, attention_mask, cache, job.chunk, records)
    step = (
        CompiledDecodeStep(model, StaticLatentCache(cache, fixed_capacity(prompt + job.new)))
        if job.compiled and job.new > 1
        else None
    )
    done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    last = prompt + job.new - 1
    lengths = torch.full_like(tokens[:, 0], prompt + job.new)  # up to each row's end token
    for position in range(prompt, prompt + job.new):
        new = sample(logits, job.temperature, job.top_k, job.top_p, job.generator)
        tokens[:, position] = new.masked_fill(done, job.pad)
        if job.callback is not None:
            job.callback(tokens[:, position])
        ending = torch.isin(new, job.ends) & ~done
        lengths, done = lengths.masked_fill(ending, position + 1), done | ending
        if len(job.ends) and bool(done.all()):
            last = position
        if position < last or records is not None:
            # A finished row goes on with what it sampled: `pad` need not be in the vocabulary.
            logits = _run(model, new[:, None], cache, records).logits[:, -1] if step is None else step(new)
        if position == last:
            break
        running = batch - int(done.sum()) if len(job.ends) else batch
        report.steps += 1
        report.row_steps += running
        report.tokens += running
    if records is not None:
        report.routing = rollout_record(records, attention_mask, prompt, lengths)
    return tokens[:, : last + 1]


def _run(model: DeepseekLM, ids: Tensor, cache, records: list[RoutingRecord] | None, **arguments) -> CausalLMOutput:
    """One pass with a cache; `records` takes its routing decisions."""
    out = model(ids, cache=cache, record_routing=records is not None, **arguments)
    if records is not None:
        records.append(out.routing)
    return out


def _speculate(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    job: _Job,
    length: DraftLength,
    report: SpeculationReport,
) -> Tensor:
    """As many tokens a step as the trunk agrees with; see `speculative`."""
    ids, valid = _left_padded(input_ids, attention_mask)
    (batch, width), device = ids.shape, ids.device
    rows = torch.arange(batch, device=device)
    prompts = torch.full_like(rows, width) if valid is None else valid.sum(-1)
    # A finished row stands still, up to a draft further than it was asked for, and is still drafted for.
    history = torch.zeros(batch, width + job.new + 2 * length.most + 2, dtype=torch.int64, device=device)
    if valid is None:
        history[:, :width] = ids
    else:
        history[rows[:, None].expand_as(ids)[valid], (valid.cumsum(-1) - 1)[valid]] = ids[valid]
    cache = model.new_cache(batch, history.shape[1], format=job.cache_format)
    drafter = Drafter(model, length.most, history)
    for start in range(0, width, job.chunk):
        part = slice(start, start + job.chunk)
        some = None if valid is None else valid[:, part]
        trunk = model.model(ids[:, part], some, cache=cache)
        drafter.prefill(trunk, some)
    sampling = (job.temperature, job.top_k, job.top_p, job.generator)

    def choose(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        if job.temperature == 0:
            return logits.argmax(-1), None
        q = sampling_probabilities(logits, job.temperature, job.top_k, job.top_p)
        return torch.multinomial(q, 1, generator=job.generator)[:, 0], q

    nothing = ids[:, :0]
    _, newest = accept(nothing, None, model.lm_head(trunk.hidden_states[:, -1:]), *sampling)
    history[rows, prompts] = newest
    made = torch.ones_like(prompts)
    done = torch.isin(newest, job.ends)
    stream = _Stream(job, history, prompts)
    while True:
        finished = done | (made >= job.new)
        stream.emit(made, finished)
        if bool(finished.all()):
            break
        started = time.perf_counter()
        count = min(length.next(), int((job.new - made)[~finished].max()) - 1)
        drafts, drawn_from = drafter.draft(count, choose) if count else (nothing, None)
        trunk = model.model(torch.cat((newest[:, None], drafts), dim=1), cache=cache)
        kept, follow = accept(drafts, drawn_from, model.lm_head(trunk.hidden_states), *sampling)
        gained = (kept + 1).masked_fill(finished, 0)
        before = drafter.lengths
        drafter.advance(trunk, gained, drafted=count > 0)
        cache.rewind(drafter.lengths)
        newest = torch.where(finished, newest, follow)
        history[rows, drafter.lengths] = newest
        # Of the new tokens, those up to the first that ends the row count.
        columns = torch.arange(count + 1, device=device)
        fresh = history.gather(1, before[:, None] + 1 + columns)
        ending = torch.isin(fresh, job.ends) & (columns < gained[:, None])
        until = torch.where(ending.any(-1), ending.long().argmax(-1) + 1, gained)
        done = done | ending.any(-1)
        more = torch.minimum(until, job.new - made).clamp(min=0)
        made = made + more
        _count(report, length, count, kept[~finished].tolist(), int(more.sum()), time.perf_counter() - started)
    report.plain_seconds = length.plain_seconds
    out = torch.cat((input_ids.long(), stream.tokens(made)), dim=1)
    return out[:, : input_ids.shape[1] + int(made.max())]


def _count(
    report: SpeculationReport, length: DraftLength, drafted: int, kept: list[int], tokens: int, seconds: float
) -> None:
    """Takes one step into the report and into the choice of the next draft's length."""
    looked_at = [sum(k >= position for k in kept) for position in range(drafted)]
    passed = [sum(k > position for k in kept) for position in range(drafted)]
    length.observe(drafted, seconds, looked_at, passed)
    missing = [0] * (drafted - len(report.drafted))
    report.drafted += missing
    report.accepted += missing
    for position in range(drafted):
        report.drafted[position] += looked_at[position]
        report.accepted[position] += passed[position]
    report.steps += 1
    report.row_steps += len(kept)
    report.tokens += tokens
    report.step_seconds += seconds


class _Stream:
    """Rows that grow unevenly, handed to the callback column by column."""

    def __init__(self, job: _Job, history: Tensor, prompts: Tensor) -> None:
        self.job, self.history, self.prompts, self.sent = job, history, prompts, 0

    def tokens(self, made: Tensor) -> Tensor:
        """The new tokens [B, max_new_tokens], padded where a row has none (any more)."""
        columns = torch.arange(self.job.new, device=made.device)
        tokens = self.history.gather(1, self.prompts[:, None] + columns)
        return tokens.masked_fill(columns >= made[:, None], self.job.pad)

    def emit(self, made: Tensor, finished: Tensor) -> None:
        """Sends the columns that every row has, or will never have."""
        if self.job.callback is None:
            return
        ready = int(made.max() if bool(finished.all()) else made[~finished].min())
        tokens = self.tokens(made)
        for column in range(self.sent, ready):
            self.job.callback(tokens[:, column])
        self.sent = max(self.sent, ready)


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The prompts ending together, as long as the longest -> ids and bool mask, None where nothing is padding."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return input_ids.long(), None
    valid = attention_mask != 0
    # A stable sort by "is a token" moves padding to the left and keeps everything else in order.
    order = valid.long().sort(dim=-1, stable=True).indices
    longest = int(valid.sum(-1).max())
    order = order[:, input_ids.shape[1] - longest :]
    valid = valid.gather(1, order)
    return input_ids.long().gather(1, order), None if bool(valid.all()) else valid


def _prefill(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache,
    chunk: int,
    records: list[RoutingRecord] | None,
) -> Tensor:
    """Runs the prompts into the cache -> logits [B, vocab_size] of each row's last prompt token."""
    batch, prompt = input_ids.shape
    last = torch.full((batch,), prompt - 1, device=input_ids.device)
    if attention_mask is not None:
        last = prompt - 1 - (attention_mask != 0).long().flip(-1).argmax(-1)
    logits = torch.empty(0)
    for start in range(0, prompt, chunk):
        ids = input_ids[:, start : start + chunk]
        mask = None if attention_mask is None else attention_mask[:, start : start + chunk]
        here = (last - start).clamp(0, ids.shape[1] - 1)[:, None]
        chosen = _run(model, ids, cache, records, attention_mask=mask, logits_to_keep=here).logits[:, 0]
        logits = chosen if start == 0 else torch.where((last >= start)[:, None], chosen, logits)
    return logits


def _end_tokens(model: DeepseekLM, eos_token_id: int | Iterable[int] | None, device) -> Tensor:
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return torch.tensor(ends, dtype=torch.int64, device=device)


def _check(model, input_ids, attention_mask, max_new_tokens, mtp_depth, temperature, top_k, top_p, chunk) -> None:
    problems = []
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"expected input_ids to be a tensor [B, T], got {type(input_ids).__name__}")
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        problems.append(f"expected input_ids [B, T] with T >= 1, got {list(input_ids.shape)}")
    elif attention_mask is not None and attention_mask.shape != input_ids.shape:
        problems.append(f"expected attention_mask {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    elif attention_mask is not None and not bool((attention_mask != 0).any(-1).all()):
        problems.append("expected at least one prompt token in every row, got a row of padding only")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        problems.append(f"expected an integer max_new_tokens >= 0, got {max_new_tokens!r}")
    if not isinstance(mtp_depth, int) or mtp_depth < 0:
        problems.append(f"expected an integer mtp_depth >= 0, got {mtp_depth!r}")
    elif mtp_depth and not len(model.mtp):
        problems.append(
            "expected mtp_depth 0 for a model without multi-token-prediction layers (num_nextn_predict_layers 0, or "
            f"loaded with mtp=False), got {mtp_depth}"
        )
    if not 0 <= temperature < math.inf:
        problems.append(f"expected a finite temperature >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        problems.append(f"expected top_k >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"expected top_p in (0, 1], got {top_p}")
    if chunk is not None and chunk < 1:
        problems.append(f"expected prefill_chunk >= 1, got {chunk}")
    if problems:
        raise ValueError("; ".join(problems))
