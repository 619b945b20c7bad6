"""Router biases in the files of adapters: PEFT saves what it has added, and balancing moves buffers of the base model.

PEFT's word for it is `bias="all"`: biases of the base model change, are saved with the adapter, and are loaded into the
base model with it; and PEFT warns that the base model without the adapter is no longer what it was. The word covers
more than the routers, and PEFT has no narrower one that reaches a buffer:

- Loading such an adapter with `is_trainable=True` makes every parameter named `bias` of the base model trainable, too.
- PEFT takes one such adapter for a model, and refuses to load a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from .moe import Router

__all__ = ["biases_in_adapters", "save_biases_with_adapters"]


def save_biases_with_adapters(model: nn.Module, routers: Mapping[str, Router]) -> None:
    """Makes the adapters of `model` save the biases of `routers` from now on, or warns that they do not.

    Warns, too, of the settings that change to `bias="all"` for it, once; the module says what that entails.

    Args:
        model: any module tree; one without adapters is left as it is.
        routers: those whose biases move, by name in `model`. Trained copies (`modules_to_save`) are saved anyway.
    """
    moved = {name: router for name, router in routers.items() if not _is_trained_copy(name)}
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
    changed = sorted(adapter for adapter, config in settings.items() if getattr(config, "bias", "all") != "all")
    for config in settings.values():
        if hasattr(config, "bias"):
            config.bias = "all"
    if changed:
        warnings.warn(
            f"adapter {', '.join(changed)} now has bias='all', so that it is saved with the router biases that "
            "balancing moves: loaded with is_trainable=True, it also trains the biases of the base model, and PEFT "
            "takes one such adapter for a model; to keep its setting, balance with rate 0",
            stacklevel=4,  # past the decorator of `step`
        )
    if without:
        warnings.warn(
            f"adapter {', '.join(without)} is saved without the router biases that balancing moves ({', '.join(moved)})"
            ": save the whole model, train copies of the routers (modules_to_save), or balance with rate 0",
            stacklevel=4,
        )


@contextmanager
def biases_in_adapters(model: nn.Module, named: bool) -> Iterator[None]:
    """Adds router biases as adapters name them to state dicts of `model` for a `with` block, or leaves them out.

    Args:
        named: True adds those names, trained copies (`modules_to_save`) aside; False leaves them all out.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    flags = {name: router.bias_among_biases for name, router in found.items()}
    try:
        for name, router in found.items():
            router.bias_among_biases = named and not _is_trained_copy(name)
        yield
    finally:
        for name, router in found.items():
            router.bias_among_biases = flags[name]


def _is_trained_copy(name: str) -> bool:
    return ".modules_to_save." in f".{name}."
