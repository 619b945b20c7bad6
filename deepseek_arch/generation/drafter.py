"""Drafts of the multi-token-prediction modules, whose caches follow what was accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.causal_lm import DeepseekLM
from ..models.outputs import MTPStep, TrunkOutput
from .sampling import Sampler

__all__ = ["Drafter"]


class Drafter:
    """Drafts tokens with the MTP modules, and keeps their caches in step with what was accepted.

    Between steps it holds the main model's hidden states of the positions that the modules have yet to run on: all
    those behind their caches, at least the last D, since module d's view of the newest positions came from drafts.

    Args:
        model: has at least one MTP module.
        depth: tokens drafted at most; beyond the number of modules, the last one is applied again to its own output.
        history: int64 [B, capacity], token i of row r at [r, i]; read, and written to beyond the known tokens.
        slots: that the caches start with (default: `capacity`).

    Attributes:
        lengths: int64 [B], L, the tokens of each row that the main model has run on.
    """

    def __init__(self, model: DeepseekLM, depth: int, history: Tensor, slots: int | None = None) -> None:
        self.model, self.depth, self.history = model, depth, history
        self.modules = min(depth, len(model.mtp))
        batch, capacity = history.shape
        self.caches = [model.new_mtp_cache(batch, slots or capacity, depth=module) for module in range(self.modules)]
        width = model.config.hidden_size
        self.trail = torch.empty(batch, 0, width, device=history.device, dtype=model.dtype)  # columns end at L - 1
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=history.device)
        self.starts = torch.zeros_like(self.lengths)  # tokens in the caches: the trail's first position

    def prefill(self, main: TrunkOutput, valid: Tensor | None) -> None:
        """Takes in the next piece of the prompts: rows end together, padding stands on the left.

        Args:
            valid: bool [B, T], or None where nothing is padding.
        """
        hidden = self.model.mtp_hidden(main)
        self.trail = torch.cat((self.trail, hidden), dim=1)
        self.lengths = self.lengths + (hidden.shape[1] if valid is None else valid.sum(-1))
        ready = self.trail.shape[1] - self.modules
        if ready > 0:
            hidden = self.trail[:, :ready]
            for module in range(self.modules):
                hidden, _ = self._apply(module, hidden, self.lengths - self.modules)
            self.starts = (self.lengths - self.modules).clamp(min=0)
            self.trail = self.trail[:, ready:]

    def prefill_modules(self, width: int, chunk: int) -> list[int]:
        """Returns how many modules `prefill` runs after each piece of prompts of `width` tokens."""
        return [self.modules if min(start + chunk, width) > self.modules else 0 for start in range(0, width, chunk)]

    def _apply(self, module: int, hidden: Tensor, ends: Tensor, head: bool = False) -> tuple[Tensor, Tensor | None]:
        """Runs one module on the columns of `hidden`, whose last belongs to position `ends` - 1.

        Columns of positions that its cache holds are passed over.

        Returns:
            The hidden state [B, W, H] for the next module, and with `head` the logits [B, vocab_size] of the last
            column.
        """
        cache, width = self.caches[module], hidden.shape[1]
        positions = ends[:, None] - width + torch.arange(width, device=ends.device)  # [B, W]
        valid = positions >= torch.tensor(cache.lengths, device=ends.device)[:, None]
        ids = self.history.gather(1, (positions + module + 1).clamp(0, self.history.shape[1] - 1))
        with cache.append(width, valid) as slots:
            mask = cache.spans(slots, valid)
            rope = self.model.model.rope(slots)
            step = MTPStep(hidden, ids, module, rope, mask, cache)
            # Through `forward`, so that what wraps the model (FSDP) runs too.
            out = self.model(mtp_step=step, logits_to_keep=1, return_logits=head)
            return out.hidden_states, None if out.logits is None else out.logits[:, -1]

    def draft(self, count: int, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
        """Drafts `count` tokens behind the known ones.

        Args:
            count: from 0, where nothing is run, to `depth`.

        Returns:
            int64 [B, count], and the distributions that they were drawn from, float32 [B, count, vocab_size], or None
            when greedy or without drafts.
        """
        if not count:
            return self.lengths.new_empty(len(self.lengths), 0), None
        rows = torch.arange(len(self.history), device=self.history.device)
        drafts, drawn_from = [], []
        hidden, ends = self.trail, self.lengths
        for step in range(max(count, self.modules)):
            module = min(step, self.modules - 1)
            if step >= self.modules:
                # The last module again, one position on: its output at a position stands for the next one's state.
                hidden, ends = hidden[:, -1:], ends + 1
            hidden, logits = self._apply(module, hidden, ends, head=step < count)
            if logits is not None:
                token, probabilities = sampler.choose(logits)
                self.history[rows, self.lengths + 1 + step] = token
                drafts.append(token)
                if probabilities is not None:
                    drawn_from.append(probabilities)
        return torch.stack(drafts, 1), torch.stack(drawn_from, 1) if drawn_from else None

    def advance(self, main: TrunkOutput, gained: Tensor, drafted: bool) -> None:
        """Takes in the main model's pass over the newest token and the drafts; rolls the caches back behind it.

        Args:
            gained: int64 [B], by how much L grows: 1 + the drafts accepted, or 0 for a row that has finished.
            drafted: True if the modules ran before this pass.
        """
        old, width = self.lengths, self.trail.shape[1]
        self.lengths = old + gained
        if drafted:  # module d read token i + d + 1 at position i, which is certain up to the last known one
            self.starts = torch.minimum(old, self.lengths - self.modules).clamp(min=0)
            for cache in self.caches:
                cache.rewind(self.starts)
        behind = int((self.lengths - self.starts).max())
        last = width + gained - 1  # each row's newest column
        columns = (last[:, None] - behind + 1 + torch.arange(behind, device=last.device)).clamp(min=0)
        combined = torch.cat((self.trail, self.model.mtp_hidden(main)), dim=1)
        self.trail = combined.gather(1, columns[..., None].expand(-1, -1, combined.shape[-1]))

    def keep_rows(self, index: Tensor) -> None:
        """Leaves only the rows `index`, int64."""
        for cache in self.caches:
            cache.reorder(index)
        self.history, self.trail = self.history[index], self.trail[index]
        self.lengths, self.starts = self.lengths[index], self.starts[index]
