"""Parts of cut parameters: which elements a rank holds, and memory for them.

`parallelize` cuts along the last axis of a mesh, and FSDP cuts what that leaves along the axes before it. A parameter
that is cut is a DTensor; a plain one is the same on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Box", "allocate_parts", "copies", "half_rows", "is_cut", "local_box", "local_tensor", "whole_box"]

Box = tuple[tuple[int, int], ...]
"""(first, end) along each dimension."""


def is_cut(tensor: Tensor) -> bool:
    """Returns True for a DTensor."""
    return hasattr(tensor, "placements")


def local_tensor(tensor: Any) -> Tensor:
    """Returns the memory that this rank has of a tensor."""
    return tensor.to_local() if is_cut(tensor) else tensor


def whole_box(tensor: Tensor) -> Box:
    """Returns the box of all elements."""
    return tuple((0, size) for size in tensor.shape)


def half_rows(tensor: Any) -> int:
    """Returns the rows of gate, and of up, in stacked experts of which etp has cut the rows of each; else 0.

    The box of such a tensor stands for a rank's rows of both, each as long as half of the box's.
    """
    names = tensor.device_mesh.mesh_dim_names or () if is_cut(tensor) else ()
    if "etp" not in names or tensor.placements[names.index("etp")].is_replicate():
        return 0
    return tensor.shape[1] // 2 if tensor.placements[names.index("etp")].dim == 1 else 0


def local_box(tensor: Any) -> Box:
    """Returns the elements that this rank has of a tensor."""
    return _box_at(tensor, tensor.device_mesh.get_coordinate()) if is_cut(tensor) else whole_box(tensor)


def _box_at(tensor: Any, coordinate: Sequence[int]) -> Box:
    """Returns the elements of a DTensor that the rank at `coordinate` of its mesh has."""
    box = list(whole_box(tensor))
    for axis, placement in reversed(list(enumerate(tensor.placements))):
        if not placement.is_replicate():
            first, end = box[placement.dim]
            step = -(-(end - first) // tensor.device_mesh.size(axis))
            start = min(first + step * coordinate[axis], end)
            box[placement.dim] = (start, min(start + step, end))
    return tuple(box)


def copies(tensor: Any, ranks: Sequence[int]) -> Iterator[list[tuple[int, Box]]]:
    """Yields the ranks and boxes that make up one whole, for each copy of a tensor that there is.

    Args:
        ranks: all that have it, or a part of it. Those on no mesh of the tensor have the same on meshes like its own.
    """
    if not is_cut(tensor):
        for rank in ranks:
            yield [(rank, whole_box(tensor))]
        return
    copied = [placement.is_replicate() for placement in tensor.placements]
    for mesh in _meshes_like(tensor.device_mesh.mesh, ranks):
        for place in itertools.product(*(range(mesh.size(axis) if copy else 1) for axis, copy in enumerate(copied))):
            along = (place[a : a + 1] if copy else range(mesh.size(a)) for a, copy in enumerate(copied))
            yield [(int(mesh[at]), _box_at(tensor, at)) for at in itertools.product(*along)]


def _meshes_like(mesh: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Returns the meshes that a slice of some axes of a larger mesh of `ranks` has beside it, and itself, in order."""
    found, left = [], sorted(ranks)
    while left:
        found.append(mesh - mesh.min() + left[0])
        left = sorted(set(left) - set(found[-1].flatten().tolist()))
    return found


def allocate_parts(model: nn.Module, device: torch.device) -> None:
    """Gives meta parameters and buffers memory for this rank's part, uninitialized; what was shared stays shared."""
    from torch.distributed.tensor import DTensor

    made: dict[int, Tensor] = {}
    for module in model.modules():
        kinds: tuple[Any, Any] = module._parameters, module._buffers
        for tensors in kinds:
            for name, meta in tensors.items():
                if meta is None or not meta.is_meta:
                    continue
                if id(meta) not in made:
                    part = meta.to_local() if isinstance(meta, DTensor) else meta
                    memory: Tensor = torch.empty(part.shape, dtype=part.dtype, device=device)
                    if isinstance(meta, DTensor):
                        shape, stride = meta.shape, meta.stride()
                        rest: dict[str, Any] = {"run_check": False, "shape": shape, "stride": stride}
                        memory = DTensor.from_local(memory, meta.device_mesh, meta.placements, **rest)
                    made[id(meta)] = (
                        nn.Parameter(memory, meta.requires_grad) if tensors is module._parameters else memory
                    )
                tensors[name] = made[id(meta)]
