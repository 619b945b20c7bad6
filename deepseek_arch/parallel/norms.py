"""Gradient clipping by a norm over parameters on different meshes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.argument_types import shown

__all__ = ["clip_grad_norm"]


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their norm is `max_norm` at most, and returns the norm that they had.

    Each element of the model counts once, however its parameter is cut or copied; every rank calls this and gets the
    same norm. `torch.nn.utils.clip_grad_norm_` takes parameters of one mesh only.

    Args:
        model: any module, `parallelize`d or not.
        max_norm: of all gradients together (Euclidean); infinity measures and changes nothing.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected model to be a Module, got {shown(model)}")
    if isinstance(max_norm, bool) or not isinstance(max_norm, Real) or not max_norm > 0:  # Inf only measures
        raise ValueError(f"expected max_norm > 0, got {shown(max_norm)}")
    max_norm = float(min(max_norm, 1e300)) if max_norm != math.inf else math.inf
    meshes: Any = getattr(model, "meshes", None)
    copies = frozenset() if meshes is None else meshes.copies
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    grads = [grad for _, grad in named]
    squares: dict[tuple, Tensor] = {}  # by the axes that parameters are cut along, in the order of parameters
    for name, grad in named:
        if name in copies:  # another rank counts it (TRAPS S21)
            continue
        local: Tensor = grad
        axes: tuple[Any, ...] = ()
        if isinstance(grad, DTensor):
            local = grad.to_local()
            # Copies along the other axes are one element of the model each.
            axes = (grad.device_mesh, tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate()))
        square = local.float().square().sum()
        squares[axes] = squares[axes] + square if axes in squares else square
    # A stage of a pipeline may have no gradients, and takes part all the same.
    default = None if meshes is None else meshes.dense.device_type
    total = torch.zeros((), device=grads[0].device if grads else default)
    for axes, square in squares.items():
        if axes:
            mesh, dims = axes
            for dim in dims:
                dist.all_reduce(square, group=mesh.get_group(dim))
        total = total + square
    if meshes is not None and meshes.layout.pp > 1:
        dist.all_reduce(total, group=meshes.pp)
    norm = total.sqrt()
    if max_norm == math.inf:
        return norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.dtype))
    return norm
