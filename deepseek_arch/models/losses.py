"""Cross-entropy of next tokens, from logits or, where the head is a plain linear layer, without holding them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_kernels import linear_cross_entropy

from ..layers.linear import Linear, is_plain_module

__all__ = ["IGNORE", "cross_entropy", "gathers_logits", "head_losses", "ignore", "plain_weight"]

IGNORE = -100


def ignore(targets: Tensor, padding: Tensor | None) -> Tensor:
    """Returns targets without those at padding, which would make the loss depend on the padding token."""
    return targets if padding is None else targets.masked_fill(padding, IGNORE)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean over the targets that are not ignored, in float32; 0 where there are none.

    Args:
        logits: [..., V].
        targets: int64 [...].
    """
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().to(logits.device), reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def head_losses(
    head: nn.Module,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    detached: bool = False,
    part: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the mean cross-entropy and the share of right guesses for each of S inputs of the head.

    A plain head's weight goes through `linear_cross_entropy`, all inputs in one call; any other is called, and makes
    the logits of one input after the other.

    Args:
        states: S tensors [..., H].
        targets: S int64 tensors [...], -100 where ignored.
        detached: treats the head's parameters as constants.
        part: of sequences cut over ranks, the tokens of these states and targets (`TrunkOutput.part`); the means are
            then those of whole sequences.

    Returns:
        losses float32 [S] and accuracies float32 [S]; 0 where every target is ignored.
    """
    if part is not None:
        return part.means(*head_losses(head, states, targets, detached=detached), targets)
    if gathers_logits(head):
        return head.losses(states, targets, detached=detached)  # type: ignore[operator]
    weight = plain_weight(head)
    if weight is None or any(weight.device != state.device for state in states):
        return _from_logits((_detached(head, state) if detached else head(state) for state in states), targets)
    rows = torch.cat([state.flatten(0, -2) for state in states])
    labels = torch.cat([target.flatten().to(rows.device) for target in targets])
    out = linear_cross_entropy(
        rows,
        weight.detach() if detached else weight,
        labels,
        ignore_index=IGNORE,
        reduction="mean",
        segments=[target.numel() for target in targets],
    )
    return out.loss.float(), out.correct / out.count.clamp(min=1)


def gathers_logits(head: nn.Module) -> bool:
    """Returns True for a head that is cut by vocabulary: it computes `head_losses` without gathering its logits."""
    return hasattr(type(head), "losses")


def plain_weight(head: nn.Module) -> Tensor | None:
    """Returns the matrix [V, H] that is all of what `head` does, or None.

    None for a bias, a hook, an adapter, a quantized layer or a sharded parameter: such a head has to be called.
    """
    if not is_plain_module(head, Linear, nn.Linear) or head.bias is not None or type(head.weight) is not nn.Parameter:
        return None
    return head.weight


def _from_logits(logits: Iterable[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    losses, right = [], []
    for one, labels in zip(logits, targets, strict=True):
        losses.append(cross_entropy(one, labels))
        guessed = (one.detach().argmax(-1) == labels.to(one.device)).sum()
        right.append(guessed / (labels != IGNORE).sum().clamp(min=1))
    return torch.stack(losses), torch.stack(right)


def _detached(module: nn.Module, x: Tensor) -> Tensor:
    """Computes `module(x)` with its parameters as constants."""
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, constants, (x,))
