"""Modules that compute on this rank's part of their parameters, which are DTensors.

What holds parameters by name (state dicts, optimizers, FSDP, distributed checkpoints) sees DTensors, which know the
whole; what computes reads attributes, and gets the local tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["OnLocalParameters", "become", "behave"]


class OnLocalParameters:
    """Mixed in before a module's class: reading a parameter gives this rank's part, differentiably.

    While FSDP has it sharded, which nothing computes with, it is on another mesh, and is what FSDP reads.

    Attributes:
        cut_mesh: over which `parallelize` has cut the module's parameters, or copied them.
        reads_as: dtype that they are cast to when they are read; None for their own.
    """

    cut_mesh: DeviceMesh
    reads_as: torch.dtype | None = None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if isinstance(value, DTensor) and value.device_mesh == self.__dict__["cut_mesh"]:
            return value.to_local() if self.reads_as is None else value.to_local().to(self.reads_as)
        return value


@functools.cache
def _on_local(kind: Any, behaviour: type | None) -> type[nn.Module]:
    bases = (OnLocalParameters, kind) if behaviour is None else (behaviour, OnLocalParameters, kind)
    # What the class states of its forward still holds, unless the behaviour changes it.
    stated = {} if behaviour is not None and "forward" in vars(behaviour) else _stated(kind)
    return type(f"Local{kind.__name__}", bases, stated)


def _stated(kind: type[nn.Module]) -> dict[str, Any]:
    return {name: vars(kind)[name] for name in ("dense_weight", "fp8_weight", "norm_consumers") if name in vars(kind)}


@functools.cache
def _behaving(kind: Any, behaviour: type) -> type[nn.Module]:
    stated = {} if "forward" in vars(behaviour) else _stated(kind)
    return type(f"{behaviour.__name__}{kind.__name__}", (behaviour, kind), stated)


def behave(module: nn.Module, behaviour: type, **attributes: Any) -> None:
    """Puts the methods of `behaviour` before a module's own, whatever its parameters are."""
    kind: Any = type(module)
    module.__class__ = _behaving(kind, behaviour)
    module.__dict__.update(attributes)


def become(module: nn.Module, mesh: DeviceMesh, behaviour: type | None = None, **attributes: Any) -> None:
    """Makes `module` compute on local parameters, with the methods of `behaviour` before its class's own.

    The module stays the same object under the same name, with the same parameters and hooks.

    Args:
        mesh: of its parameters.
        attributes: set on the module, for `behaviour`.
    """
    kind: Any = type(module)
    module.__class__ = _on_local(kind, behaviour)
    module.__dict__.update(attributes, cut_mesh=mesh)
