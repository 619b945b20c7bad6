"""Memory for modules that were built on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["allocate"]


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
