"""Modules that no loss reaches, in training with several processes.

Data-parallel wrappers (`DistributedDataParallel`, and accelerate's around it) wait for a gradient of every parameter
that requires one. Where none comes they leave gradients of the first step unsynchronized and fail in the second.
Published checkpoints have prediction modules that most fine-tuning leaves alone, and indexers that the loss of the
next token does not reach (TRAPS G6), so the models connect them to their hidden states in training: they take part in
every backward pass, with no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["connect"]


class _Connected(torch.autograd.Function):
    """Passes its first argument on; the others are reached by the backward pass and get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * ctx.others


def connect(hidden: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """Returns `hidden` such that its backward pass reaches every trainable parameter of `modules`, without a gradient.

    `grad` of such a parameter stays None, and an optimizer passes it over, unless another path gives it one. A wrapper
    that averages gradients over processes makes it zero, to which an optimizer with weight decay still applies that:
    freeze the modules (`model.mtp.requires_grad_(False)`) to keep them as they are.

    Args:
        hidden: [B, T, H]; returned as it is where nothing is differentiated.
        modules: those that no loss may reach.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return hidden
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    return _Connected.apply(hidden, *trainable) if trainable else hidden
