"""Distributed checkpoints of a model and its optimizer: written by all ranks, read on any other layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from ..config.argument_types import check_types
from ..parallel.agreement import agreed_any, on_ranks, raise_alike
from .files.shared_staging import SharedStaging
from .files.staging import SAVING

__all__ = ["load_sharded", "save_sharded"]

_METADATA = ".metadata"  # what torch.distributed.checkpoint reads first


@check_types
def save_sharded(model: nn.Module, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Writes the parameters and buffers of a model, and an optimizer's state, through `torch.distributed.checkpoint`.

    Every rank calls this and writes its own part; nothing is gathered. `load_sharded` reads it on any layout, and on
    one process. Names are the model's own; `save` writes published files. The checkpoint appears whole or not at all:
    what killed ranks leave is cleared away by the next call for the folder.

    Args:
        model: `parallelize`d, wrapped by FSDP2, or whole on one process.
        path: a folder, created if need be; every rank sees the same one.
        optimizer: over the model's parameters.

    Raises:
        ValueError: the folder holds a checkpoint or other files already, a rank cannot look into it, or another
            process is writing to it.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = Path(path)
    if agreed_any(folder.exists() and not folder.is_dir()):
        raise ValueError(_taken(path))
    with SharedStaging(folder) as staging:
        if agreed_any(_holds_files(folder)):
            raise ValueError(_taken(path))
        error: Any = None
        try:
            dcp.save(_state(model, optimizer), checkpoint_id=str(staging.path), no_dist=not on_ranks())
        except CheckpointException as raised:  # no Exception: what went wrong on each rank that failed
            error = next(iter(raised.failures.values()))[0]
        except Exception as raised:
            error = raised
        raise_alike(error)
        staging.commit(lambda: sorted(_names(staging.path), key=lambda name: (name == _METADATA, name)))


@check_types
def load_sharded(model: nn.Module, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads what `save_sharded` wrote into a model that has memory, and into an optimizer, in place.

    Every rank calls this, and reads the parts that it holds, whichever layout they were written from. Values are equal
    bit for bit.

    Args:
        model: of the same config, cut by any layout.
        path: the folder.
        optimizer: over the model's parameters, of the same kind; None leaves its saved state alone.

    Raises:
        ValueError: the folder holds no such checkpoint, one of another model, or a damaged one, or the model has no
            parameters. Where files are missing or too short, nothing has been read into the model.
    """
    folder = Path(path)
    if agreed_any(not (folder / _METADATA).is_file()):
        raise ValueError(f"expected a folder that save_sharded wrote, got {str(path)!r}")
    damaged: Exception | None = None
    try:
        _check_sizes(folder)
    except Exception as raised:  # whatever a damaged file makes of it
        damaged = ValueError(f"expected whole files in {str(path)!r}, got {raised or type(raised).__name__}")
    raise_alike(damaged)
    state = _state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=str(folder), no_dist=not on_ranks())
    except CheckpointException as error:  # alike on all ranks, and no subclass of Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(
            f"expected {str(path)!r} to hold every tensor of this {type(model).__name__}, got on rank {rank}: "
            f"{type(cause).__name__} {cause}"
        ) from error
    state = _mapped(state, _cut_again)
    optimizers = [] if optimizer is None else [optimizer]
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state.get("optimizer", {}))


def _taken(path: str | Path) -> str:
    return f"expected a new or empty folder, got {str(path)!r}"


def _check_sizes(folder: Path) -> None:
    """Checks that files have as many bytes as they should: reading would stop where one ends, with a part loaded.

    Raises:
        ValueError: one has fewer.
    """
    ends: dict[str, int] = {}
    for part in dcp.FileSystemReader(folder).read_metadata().storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        size = (folder / name).stat().st_size
        if size < end:
            raise ValueError(f"{name} of {size} bytes instead of {end}")


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def _holds_files(folder: Path) -> bool:
    """Returns False for a folder where a checkpoint can be written; one that cannot be looked into is none."""
    try:
        return _names(folder) != [SAVING]
    except OSError:
        return True


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Returns what is written: DTensors, which know their place in the whole, and plain buffers, alike on all ranks.

    Raises:
        ValueError: the model has no tensors.
    """
    if not model.state_dict():
        raise ValueError(f"expected a model with parameters, got {type(model).__name__} without any")
    of_model, of_optimizer = get_state_dict(model, [] if optimizer is None else [optimizer])
    of_model, of_optimizer = _mapped(of_model, _with_rows_in_order), _mapped(of_optimizer, _with_rows_in_order)
    if optimizer is None:
        return {"model": of_model}
    meshes: Any = getattr(model, "meshes", None)
    if meshes is not None and meshes.layout.pp > 1:
        of_optimizer["param_groups"] = _groups_of_all_stages(of_optimizer["param_groups"], meshes.pp)
    return {"model": of_model, "optimizer": of_optimizer}


def _mapped(value: Any, change: Callable[[DTensor], DTensor]) -> Any:
    """Returns a state dict with its DTensors changed."""
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return change(value) if isinstance(value, DTensor) else value


def _etp_axis(tensor: DTensor) -> int | None:
    """Returns the axis of the mesh along which etp cuts experts, or None."""
    names = tensor.device_mesh.mesh_dim_names or ()
    return names.index("etp") if "etp" in names else None


def _with_rows_in_order(tensor: DTensor) -> DTensor:
    """Returns gate and up, whose rows etp cuts each, whole along that axis: a file's part of a tensor is one box."""
    axis = _etp_axis(tensor)
    if axis is None or not isinstance(tensor.placements[axis], _StridedShard):
        return tensor
    local = tensor.to_local().unflatten(1, (2, -1)).contiguous()
    parts = [torch.empty_like(local) for _ in range(tensor.device_mesh.size(axis))]
    torch.distributed.all_gather(parts, local, group=tensor.device_mesh.get_group(axis))
    placements = list(tensor.placements)
    placements[axis] = Replicate()
    return _placed_like(tensor, torch.cat(parts, 2).flatten(1, 2), placements)


def _cut_again(tensor: DTensor) -> DTensor:
    """Undoes `_with_rows_in_order`."""
    axis = _etp_axis(tensor)
    if axis is None or not tensor.placements[axis].is_replicate():
        return tensor
    mesh, placements = tensor.device_mesh, list(tensor.placements)
    placements[axis] = _StridedShard(1, split_factor=2)
    local = tensor.to_local().unflatten(1, (2, -1)).chunk(mesh.size(axis), 2)[mesh.get_local_rank(axis)]
    return _placed_like(tensor, local.flatten(1, 2), placements)


def _placed_like(tensor: DTensor, local: Tensor, placements: list[Any]) -> DTensor:
    whole: dict[str, Any] = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(local, tensor.device_mesh, placements, **whole)


def _groups_of_all_stages(own: Any, group: Any) -> list[dict[str, Any]]:
    """Returns an optimizer's parameter groups with the names of all stages' parameters, the same on all ranks."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, own, group=group)
    whole: list[dict[str, Any]] = []
    for groups in gathered:
        for index, each in enumerate(groups):
            if index == len(whole):
                whole.append({**each, "params": []})
            whole[index]["params"] += [name for name in each["params"] if name not in whole[index]["params"]]
    return whole
