"""An independent GRPO from the papers' formulas, in float64 and with Python loops.

Equations 1 to 3 of arXiv 2501.12948 with the mean over each output's tokens of arXiv 2402.03300 (equation 3), and what
arXiv 2512.02556, section 3.1, changes. Log-probabilities come from `oracle`, one document at a time. Nothing is shared
with TRL or the package. Two constants are TRL's: advantages divide by the sample standard deviation plus 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import oracle


def advantages(rewards: Sequence[float | None], group: int) -> list[float]:
    """Returns (r - mean) / std within each group of outputs; 0 for an output without a reward."""
    out: list[float] = []
    for start in range(0, len(rewards), group):
        part = rewards[start : start + group]
        given = [r for r in part if r is not None]
        mean = sum(given) / len(given)
        std = math.sqrt(sum((r - mean) ** 2 for r in given) / (len(given) - 1))
        out += [0.0 if r is None else (r - mean) / (std + 1e-4) for r in part]
    return out


def token_log_probs(
    config, weights: Mapping[str, Tensor], prompt: Sequence[int], output: Sequence[int]
) -> list[Tensor]:
    """Returns log pi(o_t | q, o_<t) of each token of one output."""
    logits = oracle.run(config, weights, [*prompt, *output]).logits
    first = len(prompt) - 1
    return [torch.log_softmax(logits[first + t], -1)[token] for t, token in enumerate(output)]


def loss(
    policy: Sequence[Sequence[Tensor]],
    old: Sequence[Sequence[Tensor]],
    reference: Sequence[Sequence[Tensor]] | None,
    advantage: Sequence[float],
    *,
    epsilon: float,
    beta: float = 0.0,
    unbiased: bool = False,
    delta: float | None = None,
) -> Tensor:
    """Returns minus the objective of a batch of outputs.

    Args:
        policy, old, reference: log-probabilities, by output and token.
        unbiased: weight the divergence by pi / pi_old (V3.2).
        delta: outputs with a negative advantage whose mean of log(pi_old / pi) exceeds it contribute no policy term
            (V3.2's off-policy masking).
    """
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(policy):
        drift = sum(float(old[i][t] - output[t].detach()) for t in range(len(output))) / len(output)
        masked = delta is not None and advantage[i] < 0 and drift > delta
        objective = torch.zeros((), dtype=torch.float64)
        for t, log_prob in enumerate(output):
            ratio = torch.exp(log_prob - old[i][t].detach())
            clipped = (
                ratio
                if 1 - epsilon <= float(ratio.detach()) <= 1 + epsilon
                else torch.tensor(1 + epsilon if float(ratio.detach()) > 1 else 1 - epsilon, dtype=torch.float64)
            )
            term = advantage[i] * ratio
            if float(advantage[i] * clipped.detach()) < float(term.detach()):
                term = advantage[i] * clipped
            objective = objective + (0.0 if masked else term)
            if beta:
                away = reference[i][t].detach() - log_prob
                divergence = torch.exp(away) - away - 1
                objective = objective - beta * divergence * (ratio if unbiased else 1.0)
        total = total - objective / len(output)
    return total / len(policy)
