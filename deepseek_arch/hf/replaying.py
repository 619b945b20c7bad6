"""Recorded routing decisions replayed in a transformers model, so that a rollout is trained on with its own experts.

A mixture of experts may route the same tokens otherwise when it trains than when it generated, by rounding or because
the weights have moved since, and reinforcement learning on the difference is unstable. DeepSeek keeps the rollout's
experts in training ("Keep Routing", arXiv 2512.02556, section 3.1; TRAPS T11).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..moe.routing_record import RoutingRecord

__all__ = ["replaying"]


@contextmanager
def replaying(model: Any, record: RoutingRecord | None) -> Iterator[None]:
    """Lets every forward pass of `model` within take the decisions of `record` instead of its routers' own.

    For trainers that pass no arguments to the model; `model(..., replay_routing=record)` does the same for one call.
    Weights are still the routers', and differentiable. Layers that the record does not have decide for themselves, as
    prediction layers do. Passes that have to be replayed in another order, or with other tokens, fail.

    Args:
        model: one of this package's models for transformers, or anything that wraps one.
        record: decisions for the tokens of each pass, padding included; None for the routers' own.

    Raises:
        ValueError: nothing of `model` is a trunk of this package.
    """
    from .base import DeepseekModel

    trunks = [module for module in model.modules() if isinstance(module, DeepseekModel)]
    if not trunks:
        raise ValueError(f"expected a model of deepseek_arch.hf to replay routing in, got {type(model).__name__}")
    before = [trunk.replayed_routing for trunk in trunks]
    try:
        for trunk in trunks:
            trunk.replayed_routing = record
        yield
    finally:
        for trunk, previous in zip(trunks, before, strict=True):
            trunk.replayed_routing = previous
