"""V3's sequence-wise balance loss as the report writes it (equations 17 to 20), token by token in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


@contextmanager
def watched_balance(main_model: nn.Module, gates: list[Router], top_k: int) -> Iterator[list[float]]:
    """Collects the loss of every call of a main model with gradients, from what the routers' hooks see meanwhile.

    Args:
        main_model: called with `attention_mask`, where tokens are padding.
        gates: its routers; their weights are taken as they are in the call.
    """
    losses: list[float] = []
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def see(index: int) -> Callable[[Router, tuple], None]:
        return lambda gate, args: seen.update({index: (args[0].detach().clone(), gate.weight.detach().clone())})

    def close(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if torch.is_grad_enabled() and module.training:
            hidden = seen[0][0]
            mask = kwargs.get("attention_mask")
            mask = torch.ones(hidden.shape[:2], dtype=torch.long) if mask is None else mask
            assert len(seen) == len(gates) and mask.shape == hidden.shape[:2]
            losses.append(sum(sequence_balance_loss(x, weight, top_k, mask) for x, weight in seen.values()))
        seen.clear()

    hooks = [gate.register_forward_pre_hook(see(index)) for index, gate in enumerate(gates)]
    hooks.append(main_model.register_forward_hook(close, with_kwargs=True))
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()
