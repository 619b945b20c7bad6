"""Parameters that accelerate has taken out of memory, in training."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["check_not_offloaded"]


def check_not_offloaded(model: nn.Module, device: torch.device) -> None:
    """Checks that what is to be trained has a place for its gradient; nothing to check without gradients.

    accelerate's offloading puts a copy of a parameter on the device for one forward pass, and the copy is what the
    backward pass would give a gradient to. The parameter, on the meta device, gets none.

    Args:
        device: of the model's input; on the meta device itself there is nothing to train.

    Raises:
        ValueError: a parameter that requires a gradient is offloaded, in training mode; the message names it.
    """
    if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or device.type == "meta":
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad:
            raise ValueError(
                f"expected parameters in memory in training, got an offloaded one ({name}): accelerate drops the "
                "gradients of offloaded parameters. Freeze them (requires_grad_(False)), or load without offloading"
            )
