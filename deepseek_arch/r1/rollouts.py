"""Completions sampled for training, with the routing decisions that they were made with.

Notation: N rows, P tokens of the longest prompt, C of the longest completion, L layers with experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..generation.entry import generate
from ..moe.routing_record import RoutingRecord
from .checks import check_lengths

__all__ = ["Rollout", "Sampling", "aligned_routing", "routing_record", "sample_natively"]


@dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are drawn.

    Attributes:
        max_new_tokens: of a completion, its end token included.
        temperature: 0 takes the most probable token.
        top_k, top_p: see `deepseek_arch.generate`.
        end_tokens: that end a completion.
        pad_token: fills shorter rows.
        seed: makes a rollout repeatable; None draws from the global random state.
        mtp_depth: tokens that prediction layers draft in a step; 0 for none. Sampled tokens are distributed alike.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    end_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    seed: int | None = None
    mtp_depth: int = 0


@dataclass
class Rollout:
    """Prompts with one completion each.

    Attributes:
        prompts, completions: token ids of each row, completions with their end token.
        ended: by row, False for a completion that was cut off.
        logprobs: by row, float32 [completion], log-probabilities of its tokens at the rollout's temperature, before
            `top_k` and `top_p`; None for an engine that does not give them.
        drafted, accepted: by position in a draft, tokens that were looked at, and accepted.
        routing: by row, int16 or int32 [prompt + completion, L, K], or None where it was not recorded.
        layers: the indices of those layers.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    ended: list[bool]
    logprobs: list[Tensor] | None = None
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    routing: list[Tensor] | None = None
    layers: tuple[int, ...] = ()


def sample_natively(
    core: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, record_routing: bool = False
) -> Rollout:
    """Samples one completion for each prompt with `deepseek_arch.generate`; rows that have ended leave the batch.

    Args:
        core: the `DeepseekLM`.
        prompts: token ids; a prompt that stands there n times gets n completions.
        record_routing: keeps the routing decisions of each row, without those of its padding.

    Raises:
        ValueError: an empty prompt, a model of too few positions, drafts of a model without prediction layers, or
            routing of a model without experts.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or not all(prompts):
        raise ValueError("expected at least one prompt and none without tokens, got an empty one")
    check_lengths(longest, sampling.max_new_tokens, core.config.max_position_embeddings)
    ids, mask = _left_padded(prompts, sampling.pad_token, core.lm_head.weight.device)
    # What is made here is read, and copied below: it needs neither versions nor views that autograd could follow.
    with torch.inference_mode():
        tokens, report = generate(
            core,
            ids,
            mask,
            sampling.max_new_tokens,
            sampling.mtp_depth,
            sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_id=sampling.end_tokens,
            pad_token_id=sampling.pad_token,
            seed=sampling.seed,
            adaptive=False,  # else the tokens that are drawn would depend on measured times
            drop_finished=True,
            return_logprobs=True,
            record_routing=record_routing,
        )
    completions, ended = _cut(tokens[:, longest:].tolist(), sampling.end_tokens)
    assert report.logprobs is not None
    given = report.logprobs.cpu().clone()
    logprobs = [given[i, : len(completion)] for i, completion in enumerate(completions)]
    rollout = Rollout(
        [list(prompt) for prompt in prompts], completions, ended, logprobs, report.drafted, report.accepted
    )
    if record_routing:
        assert report.routing is not None
        rollout.layers = tuple(sorted(report.routing.ids))
        stacked = torch.stack([report.routing.ids[layer] for layer in rollout.layers], 2)  # [N, P + C, L, K]
        rollout.routing = [
            stacked[i, longest - len(prompt) : longest + len(completion)].cpu().clone()
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
    return rollout


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Returns int64 [N, P] ids and mask, rows ending together."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _cut(rows: Sequence[list[int]], ends: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    """Returns the rows up to their first end token, that one included, and which of them have one."""
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), 0) for row in rows]
    return [row[:n] if n else row for row, n in zip(rows, lengths, strict=True)], [n > 0 for n in lengths]


def aligned_routing(rollout: Rollout, prompt_width: int, completion_width: int) -> Tensor:
    """Returns the decisions of a rollout as a trainer lays out its tokens: [N, P + C, L, K].

    Prompts are padded on the left to `prompt_width`, completions on the right to `completion_width`. Padding gets the
    first K experts, which are read by nothing.

    Raises:
        ValueError: no routing was recorded, or rows do not fit.
    """
    if rollout.routing is None:
        raise ValueError("expected a rollout with recorded routing, got one without")
    first = rollout.routing[0]
    out = torch.arange(first.shape[-1], dtype=first.dtype).repeat(
        len(rollout.routing), prompt_width + completion_width, first.shape[1], 1
    )
    for i, (prompt, part) in enumerate(zip(rollout.prompts, rollout.routing, strict=True)):
        start, width = prompt_width - len(prompt), part.shape[0]
        if start < 0 or start + width > prompt_width + completion_width:
            raise ValueError(
                f"expected rows of at most {prompt_width} and {completion_width} tokens, got {len(prompt)} and "
                f"{width - len(prompt)}"
            )
        out[i, start : start + width] = part
    return out


def routing_record(stacked: Tensor, layers: Sequence[int], valid: Tensor | None = None) -> RoutingRecord:
    """Returns stacked decisions [N, T, L, K] as a record."""
    return RoutingRecord({layer: stacked[:, :, i] for i, layer in enumerate(layers)}, {}, valid)
