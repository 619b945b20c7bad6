"""Recorded routing decisions replayed in a transformers model, so that a rollout is trained on with its own experts.

A mixture of experts may route the same tokens differently in training than in generation, by rounding or because
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
    MTP modules do. Passes that have to be replayed in another order, or with other tokens, fail.

    Args:
        model: one of this package's models for transformers, or anything that wraps one.
        record: decisions for the tokens of each pass, padding included; None for the routers' own.

    Raises:
        ValueError: no part of `model` is a main model of this package.
    """
    from .main_model import DeepseekModel

    mains = [module for module in model.modules() if isinstance(module, DeepseekModel)]
    if not mains:
        raise ValueError(f"expected a model of deepseek_arch.hf to replay routing in, got {type(model).__name__}")
    before = [main.replayed_routing for main in mains]
    try:
        for main in mains:
            main.replayed_routing = record
        yield
    finally:
        for main, previous in zip(mains, before, strict=True):
            main.replayed_routing = previous
