"""Memory for modules that were built on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["allocate", "check_device"]


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives meta parameters and buffers memory, uninitialized; what was shared stays shared.

    Not `to_empty`: creating a tensor like one on meta makes PyTorch import its compiler, seconds and 150 MB.
    """
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, meta in tensors.items():
                if meta is None:
                    continue
                if id(meta) not in made:
                    memory = torch.empty(meta.shape, dtype=meta.dtype, device=device)
                    made[id(meta)] = (
                        nn.Parameter(memory, meta.requires_grad) if isinstance(meta, nn.Parameter) else memory
                    )
                setattr(part, name, made[id(meta)])


def check_device(device: torch.device | str) -> torch.device:
    """Returns a device that has memory.

    Raises:
        ValueError: it is not available, or is the meta device.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError, ImportError, AttributeError) as error:
        # ImportError is what PyTorch raises for the devices of packages that are not installed.
        raise ValueError(f"expected an available device, got {device!r}: {error}") from None
    if checked.type == "meta":
        raise ValueError("expected a device with memory, got 'meta'; DeepseekLM(config, device='meta') builds one")
    return checked
