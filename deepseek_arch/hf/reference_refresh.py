"""TRL's refresh of a reference model (`sync_ref_model`): it mixes parameters, and router biases are buffers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..moe.load_balancer import routers

__all__ = ["copy_biases", "refresh_copies_biases"]


@torch.no_grad()
def copy_biases(model: Any, target: Any) -> None:
    """Copies the router biases of `model` into `target`, of the same architecture.

    They are copied, not mixed: a mean of two biases routes like neither.
    """
    for router, other in zip(routers(model).values(), routers(target).values(), strict=True):
        if router.e_score_correction_bias is not None:
            other.e_score_correction_bias.copy_(router.e_score_correction_bias)


def refresh_copies_biases() -> Callable[[], None]:
    """Makes TRL's refresh copy router biases as well; returns a function that undoes it. Nothing without TRL."""
    kind = getattr(sys.modules.get("trl.trainer.callbacks"), "SyncRefModelCallback", None)
    if kind is None:
        return lambda: None
    original = vars(kind)["sync_target_model"]

    def sync_target_model(model: Any, target_model: Any, alpha: float) -> None:
        original.__func__(model, target_model, alpha)
        copy_biases(model, target_model)

    kind.sync_target_model = staticmethod(sync_target_model)

    def undo() -> None:
        kind.sync_target_model = original

    return undo
