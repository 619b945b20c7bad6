"""V3's sequence-wise balance loss as the report writes it (equations 17 to 20), token by token in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_arch.moe.moe import Router


def sequence_balance_loss(hidden: Tensor, gate: Tensor, top_k: int, mask: Tensor) -> float:
    """The loss of one layer without its factor: the mean over sequences of sum over experts of f P.

    Args:
        hidden: [B, T, H], inputs of the router; gate: [E, H], its weight.
        mask: [B, T], zero for padding.
    """
    experts, losses = gate.shape[0], []
    for row, valid in zip(hidden.double(), mask, strict=True):
        tokens = [token for token, real in zip(row, valid.tolist(), strict=True) if real]
        if not tokens:
            continue
        f, p = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
        for token in tokens:
            scores = torch.sigmoid(gate.double() @ token)
            for expert in sorted(range(experts), key=lambda e, s=scores: -float(s[e]))[:top_k]:
                f[expert] += experts / (top_k * len(tokens))
            p += scores / scores.sum() / len(tokens)
        losses.append(float(f @ p))
    return sum(losses) / len(losses)


def balance_loss_of(gates: list[Router], top_k: int, mask: Tensor, call: Callable[[], object]) -> float:
    """The sum over `gates` of their losses in `call()`, from the inputs that their hooks see."""
    seen: dict[int, Tensor] = {}
    hooks = [
        gate.register_forward_pre_hook(lambda module, args, i=i: seen.update({i: args[0].detach()}))
        for i, gate in enumerate(gates)
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(gates)
    return sum(sequence_balance_loss(seen[i], gate.weight.detach(), top_k, mask) for i, gate in enumerate(gates))
