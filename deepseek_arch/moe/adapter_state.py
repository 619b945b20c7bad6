"""Router biases in the files of adapters: PEFT saves what it has added, and balancing moves buffers of the base model.

PEFT's word for it is `bias="all"`: biases of the base model change, are saved with the adapter, and are loaded into the
base model with it; and PEFT warns that the base model without the adapter is no longer what it was.
"""

from __future__ import annotations

import warnings

from torch import nn

__all__ = ["save_biases_with_adapters"]


def save_biases_with_adapters(model: nn.Module, biases: list[str]) -> None:
    """Makes the adapters of `model` save router biases from now on, or warns that they do not.

    Args:
        model: any module tree; one without adapters is left as it is.
        biases: names of the buffers that move, in `model`. Those of trained copies (`modules_to_save`) are saved anyway.
    """
    moved = [name for name in biases if ".modules_to_save." not in f".{name}"]
    if not moved:
        return
    for module in model.modules():
        for adapter, settings in getattr(module, "peft_config", {}).items():
            if getattr(settings, "bias", "all") == "all" and hasattr(settings, "bias"):
                continue
            if getattr(settings, "peft_type", None) == "LORA":
                settings.bias = "all"
            elif not getattr(settings, "_warned_of_router_biases", False):
                settings._warned_of_router_biases = True
                warnings.warn(
                    f"adapter {adapter!r} ({getattr(settings, 'peft_type', None)}) will be saved without the router "
                    f"biases that balancing moves ({', '.join(moved[:4])}{', ...' if len(moved) > 4 else ''}): save the "
                    "whole model, train copies of the routers (modules_to_save), or balance with rate 0",
                    stacklevel=4,
                )
