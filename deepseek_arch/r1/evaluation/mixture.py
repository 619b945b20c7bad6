"""Measures of the parts that no reward sees: acceptance of drafts, and balance of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..rollouts import Sampling
from .reasoning import Sampler

__all__ = ["expert_violation", "mtp_acceptance"]


def mtp_acceptance(
    policy: Sampler, prompts: Sequence[Sequence[int]], sampling: Sampling, depth: int = 1
) -> list[float | None]:
    """Returns the share of accepted drafts by position (TRAPS T2); None where no draft was looked at.

    Args:
        depth: tokens to draft in a step.

    Raises:
        ValueError: a policy without prediction layers.
    """
    rollout = policy.sample(prompts, replace(sampling, mtp_depth=depth))
    return [a / d if d else None for a, d in zip(rollout.accepted, rollout.drafted, strict=True)]


def expert_violation(policy: Sampler, prompts: Sequence[Sequence[int]], sampling: Sampling, experts: int) -> float:
    """Returns how far the busiest expert of any layer is above its share, over prompts and responses: 0 is balanced.

    MaxVio of arXiv 2408.15664: tokens of the busiest expert over the mean of the experts, minus 1; the worst layer's.

    Args:
        experts: routed experts of a layer.

    Raises:
        ValueError: a policy without experts.
    """
    rollout = policy.sample(prompts, sampling, record_routing=True)
    assert rollout.routing is not None
    decisions = torch.cat(rollout.routing).long()  # [tokens, L, K]
    worst = 0.0
    for layer in range(decisions.shape[1]):
        load = torch.bincount(decisions[:, layer].flatten(), minlength=experts).double()
        worst = max(worst, float(load.max() / load.mean()) - 1)
    return worst
