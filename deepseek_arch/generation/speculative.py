"""Speculative decoding with the multi-token-prediction modules: several tokens a step, the text unchanged.

A step drafts k tokens with the MTP modules, runs the main model once on the newest token and the drafts, and accepts
the drafts that the main model agrees with, plus the one token that it says next (V3 report, section 5.4.3; arXiv
2302.01318 for the sampling). Rows accept differently, so every row has its own length, and every cache is rewound row
by row.

Notation: R rows in the batch, L tokens of a row that the main model has run on, D MTP modules in use. Token 0 of a row
is its first real token; tokens 0 to L are known, the main model has run on 0 to L - 1. MTP module d reads, at position
i, the output of module d - 1 (or of the main model) at i and the embedding of token i + d + 1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.latent_cache import LatentCache
from ..models.causal_lm import DeepseekLM
from ..moe.routing_record import RoutingRecord
from .draft_length import DraftLength
from .drafter import Drafter
from .finite_check import FiniteCheck, finite_at
from .new_tokens import NewTokens
from .report import SpeculationReport
from .routing_rollout import RolloutRouting, valid_tokens
from .sampling import Sampler
from .settings import GenerationSettings
from .shared_steps import SharedSteps

__all__ = ["accept", "decode_with_drafts"]


def decode_with_drafts(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: GenerationSettings,
    length: DraftLength,
    report: SpeculationReport,
) -> Tensor:
    """Continues prompts, as many tokens a step as the main model agrees with; see `generate`.

    Returns:
        int64 [B, new], the new tokens.
    """
    text, check = NewTokens(len(input_ids), settings), settings.finite_check(model)
    routing = RolloutRouting() if settings.record_routing else None
    shared = SharedSteps(model)
    batch = _prefill(model, input_ids, attention_mask, settings, length.most, text, check, routing, shared)
    while True:
        with shared.alone():
            finished = text.finished(batch.rows)
            text.emit(batch.rows[~finished])
            done = bool(finished.all())
            wanted = 0 if done else min(length.next(), text.missing(batch.rows[~finished]) - 1)
        count, ended = shared.agree(wanted, done and (routing is None or bool(batch.recorded.all())))
        if ended:
            break
        keep = None if done else settings.rows_to_keep(finished if routing is None else batch.recorded)
        if keep is not None:
            batch.keep_rows(keep)
            finished = finished[keep]
        started = time.perf_counter()

        # 1. Draft tokens behind the newest one, for all rows as many.
        drafts, drawn_from = batch.drafter.draft(count, batch.sampler)
        # 2. Run the main model once, on the newest token and the drafts.
        before, window = batch.drafter.lengths, torch.cat((batch.newest[:, None], drafts), dim=1)
        out = model(window, cache=batch.cache, record_routing=routing is not None, return_trunk=True)
        logits, record = out.logits, out.routing
        with shared.alone():
            # 3. Accept the drafts that it agrees with, and one token more.
            accepted, follow, finite = accept(drafts, drawn_from, logits, batch.sampler)
            check(finite, ignored=finished[:, None])
            gained = (accepted + 1).masked_fill(finished, 0)
            # 4. Roll back: every cache forgets its row's rejected drafts.
            batch.drafter.advance(out.trunk, gained, drafted=count > 0)
            batch.cache.rewind(batch.drafter.lengths)
            batch.set_newest(torch.where(finished, batch.newest, follow))

            fresh = torch.cat((drafts, follow[:, None]), dim=1).scatter(1, accepted[:, None], follow[:, None])
            taken = text.add(batch.rows, fresh, gained, logits)
            if record is not None and routing is not None:
                batch.add_routing(routing, record, before, gained, finished)
            if not done:
                _count(report, length, accepted[~finished].tolist(), count, taken, time.perf_counter() - started)
    with shared.alone():
        check.look()
    shared.all_done(True)  # no rank returns where another raises
    report.plain_seconds, report.logprobs = length.plain_seconds, text.logprobs()
    if routing is not None:
        report.routing = routing.record(valid_tokens(attention_mask, input_ids.shape[1], text.made))
    return text.tokens()


def accept(
    drafts: Tensor, drawn_from: Tensor | None, logits: Tensor, sampler: Sampler
) -> tuple[Tensor, Tensor, Tensor]:
    """Decides how many drafts to accept, and the token that comes after them.

    Greedy: drafts are accepted as long as they are the most probable token. Sampling: draft x, drawn from q, is
    accepted with probability min(1, p(x) / q(x)), where p and q are after the same temperature and nucleus; the token
    behind the accepted ones is drawn from max(p - q, 0), normalized, or from p where all were accepted. The result is
    distributed as if it had been drawn from p (TRAPS F11).

    Args:
        drafts: int64 [R, k]; k may be 0.
        drawn_from: float32 [R, k, vocab_size], the distributions of the drafts; None when greedy or without drafts.
        logits: [R, k + 1, vocab_size] of the main model, for the token at each draft's place and the one behind.

    Returns:
        int64 [R], the number of drafts accepted; int64 [R], the token behind them; bool [R, k + 1], False where a
        decision was taken from logits that are not finite.
    """
    count = drafts.shape[1]
    if sampler.greedy:
        best = logits.argmax(-1)  # [R, k + 1]
        accepted = (drafts == best[:, :count]).long().cumprod(-1).sum(-1)
        follow, finite = best.gather(1, accepted[:, None])[:, 0], finite_at(logits, best)
    else:
        p = sampler.probabilities(logits)  # [R, k + 1, V]
        accepted, remaining = torch.zeros_like(drafts.sum(-1)), p[:, 0]
        if drawn_from is not None:
            chosen = drafts[..., None]
            chances = sampler.uniform(count, drafts.device)
            # u q < p rather than u < p / q: nothing to divide by, and a draft that p excludes never passes.
            passed = chances * drawn_from.gather(-1, chosen)[..., 0] < p[:, :count].gather(-1, chosen)[..., 0]
            accepted = passed.long().cumprod(-1).sum(-1)
            # Beyond the last draft q counts as zero, and the rest is p itself.
            q = torch.cat((drawn_from, torch.zeros_like(p[:, :1])), dim=1)
            row = torch.arange(len(drafts), device=drafts.device)
            rest = (p[row, accepted] - q[row, accepted]).clamp(min=0)
            # Rounding may leave nothing where p and q agree; then the rejected draft had no chance to be.
            remaining = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, accepted])
        follow, finite = sampler.draw(remaining), p[..., 0].isfinite()
    # Logits behind a rejected draft decide nothing.
    behind = torch.arange(count + 1, device=drafts.device) > accepted[:, None]
    return accepted, follow, finite | behind


@dataclass
class _Batch:
    """The rows that decode together.

    Attributes:
        rows: int64 [R], rows of the result.
        prompts: int64 [R], tokens of each prompt, without padding.
        newest: int64 [R], token L of each row.
        recorded: bool [R], True for finished rows whose newest token has been run and its routing recorded.
        width: tokens of the prompts in the result, padding included.
    """

    cache: LatentCache
    drafter: Drafter
    sampler: Sampler
    rows: Tensor
    prompts: Tensor
    newest: Tensor
    recorded: Tensor
    width: int

    def set_newest(self, tokens: Tensor) -> None:
        """Makes `tokens`, int64 [R], token L of each row."""
        self.newest = tokens
        rows = torch.arange(len(tokens), device=tokens.device)
        self.drafter.history[rows, self.drafter.lengths] = tokens

    def keep_rows(self, index: Tensor) -> None:
        """Leaves only the rows `index`, int64."""
        self.cache.reorder(index)
        self.drafter.keep_rows(index)
        self.sampler.keep_rows(index)
        self.rows, self.prompts = self.rows[index], self.prompts[index]
        self.newest, self.recorded = self.newest[index], self.recorded[index]

    def add_routing(
        self, routing: RolloutRouting, record: RoutingRecord, before: Tensor, gained: Tensor, finished: Tensor
    ) -> None:
        """Adds the routing of a pass over positions `before` and on: of tokens that stay, each of them once."""
        offsets = torch.arange(record.shape[1], device=before.device)
        columns = self.width + (before - self.prompts)[:, None] + offsets
        # A finished row's newest token stays in the window of every step; its first pass counts.
        final = torch.where(finished & ~self.recorded, 1, gained)
        routing.add(record, self.rows, columns, offsets < final[:, None])
        self.recorded = self.recorded | finished


def _prefill(
    model: DeepseekLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: GenerationSettings,
    most: int,
    text: NewTokens,
    check: FiniteCheck,
    routing: RolloutRouting | None,
    shared: SharedSteps,
) -> _Batch:
    """Runs the prompts through the main model and the MTP modules, and takes the first new token of every row."""
    ids, valid, places = _left_padded(input_ids, attention_mask)
    rows = torch.arange(len(ids), device=ids.device)
    width = ids.shape[1]
    prompts = torch.full_like(rows, width) if valid is None else valid.sum(-1)
    # A finished row stays at its length, up to a draft further than it was asked for, and is still drafted for.
    history = ids.new_zeros(len(ids), width + settings.new_tokens + 2 * most + 2)
    if valid is None:
        history[:, :width] = ids
    else:
        history[rows[:, None].expand_as(ids)[valid], (valid.cumsum(-1) - 1)[valid]] = ids[valid]
    slots = settings.capacity(width)
    cache = model.new_cache(len(ids), slots, format=settings.cache_format)
    drafter = Drafter(model, most, history, slots)
    shared.check_prompts(most, drafter.prefill_modules(width, settings.prefill_chunk))
    for start in range(0, width, settings.prefill_chunk):
        part = slice(start, start + settings.prefill_chunk)
        mask = None if valid is None else valid[:, part]
        out = model(
            ids[:, part], mask, cache=cache, logits_to_keep=1, record_routing=routing is not None, return_trunk=True
        )
        drafter.prefill(out.trunk, mask)
        if out.routing is not None and routing is not None:
            routing.add(out.routing, rows, places[:, part], mask)
    logits = out.logits
    sampler = settings.sampler(len(ids))
    with shared.alone():
        _, newest, finite = accept(ids[:, :0], None, logits, sampler)
        check(finite, ignored=torch.zeros_like(finite))
    text.add(rows, newest[:, None], torch.ones_like(rows), logits)
    nothing = torch.zeros_like(rows, dtype=torch.bool)
    batch = _Batch(cache, drafter, sampler, rows, prompts, newest, nothing, input_ids.shape[1])
    batch.set_newest(newest)
    return batch


def _count(
    report: SpeculationReport, length: DraftLength, accepted: list[int], drafted: int, tokens: int, seconds: float
) -> None:
    """Takes one step into the report and into the choice of the next draft's length."""
    looked_at = [sum(number >= position for number in accepted) for position in range(drafted)]
    passed = [sum(number > position for number in accepted) for position in range(drafted)]
    length.add_step(drafted, seconds, looked_at, passed)
    report.add_step(len(accepted), tokens, looked_at, passed, seconds)


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The prompts ending together, as long as the longest.

    Returns:
        int64 [B, W], the ids; bool [B, W], False for padding, or None where nothing is; int64 [B, W], their columns in
        `input_ids`.
    """
    batch, width = input_ids.shape
    if attention_mask is None or bool((attention_mask != 0).all()):
        return input_ids, None, torch.arange(width, device=input_ids.device).expand(batch, width)
    valid = attention_mask != 0
    # A stable sort by "is a token" moves padding to the left and keeps everything else in order.
    order = valid.long().sort(dim=-1, stable=True).indices
    order = order[:, width - int(valid.sum(-1).max()) :]
    valid = valid.gather(1, order)
    return input_ids.gather(1, order), None if bool(valid.all()) else valid, order
