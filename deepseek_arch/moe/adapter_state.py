"""Router biases in the files of adapters: PEFT saves what it has added, and balancing moves buffers of the base model.

PEFT's word for it is `bias="all"`: biases of the base model change, are saved with the adapter, and are loaded into the
base model with it; and PEFT warns that the base model without the adapter is no longer what it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from .moe import Router

__all__ = ["save_biases_with_adapters"]


def save_biases_with_adapters(model: nn.Module, routers: Mapping[str, Router]) -> None:
    """Makes the adapters of `model` save the biases of `routers` from now on, or warns that they do not.

    Args:
        model: any module tree; one without adapters is left as it is.
        routers: those whose biases move, by name in `model`. Trained copies (`modules_to_save`) are saved anyway.
    """
    moved = {name: router for name, router in routers.items() if ".modules_to_save." not in f".{name}."}
    settings = {
        f"{adapter} ({config.peft_type})": config
        for module in model.modules()
        for adapter, config in (getattr(module, "peft_config", None) or {}).items()
    }
    if not moved or not settings:
        return
    for router in moved.values():
        router.bias_among_biases = True
    without = sorted(adapter for adapter, config in settings.items() if not hasattr(config, "bias"))
    for config in settings.values():
        if hasattr(config, "bias"):
            config.bias = "all"
    if without:
        warnings.warn(
            f"adapter {', '.join(without)} is saved without the router biases that balancing moves ({', '.join(moved)})"
            ": save the whole model, train copies of the routers (modules_to_save), or balance with rate 0",
            stacklevel=3,
        )
