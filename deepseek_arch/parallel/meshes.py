"""Meshes of a layout over the ranks that run, and the groups that losses, gradients and stages are summed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..layout.parallel_layout import ParallelLayout
from ..layout.parameter_map import layer_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .stage_plan import StagePlan

__all__ = ["Meshes", "mesh_device"]


class Meshes:
    """Two meshes of a layout: one of everything but routed experts, and one of those.

    Args:
        layout: fits the number of ranks.
        device_type: of the parameters.

    Attributes:
        dense: axes pp, dp_replicate, dp_shard (with cp: both share parameters) and tp; experts: axes pp, dp_replicate,
            edp, ep and etp; different: the ranks of a stage that see different tokens, as a mesh of one axis.
        data: ranks of a stage that see different tokens, of which each tensor-parallel rank has a group.
        stages: how `pipeline` has cut the model, else None.
        param_dtype: what FSDP casts parameters to for computing; None for their own dtype.
        copies: names of parameters that the first stage has on another rank, and that this rank has a copy of.
    """

    def __init__(self, layout: ParallelLayout, device_type: str) -> None:
        self.layout = layout
        sizes = layout.dense_mesh
        shards = {"pp": sizes["pp"], "dp_replicate": sizes["dp_replicate"], "dp_shard": layout.dense_shards}
        self.dense = _mesh(shards | {"tp": layout.tp}, device_type)
        self.experts = _mesh(layout.expert_mesh, device_type)
        self.different = self.dense["dp_replicate", "dp_shard"]._flatten("data")
        self.data: ProcessGroup = self.different.get_group()
        self._both = self.experts["ep", "etp"]._flatten("ep_and_etp") if layout.etp > 1 else self.experts["ep"]
        replicated = layout.dp_replicate > 1
        self._replica = self.dense["dp_shard", "tp"]._flatten("replica") if replicated else None
        self._places = _mesh(sizes, device_type) if layout.cp > 1 else None
        self.stages: StagePlan | None = None
        self.copies: frozenset[str] = frozenset()
        self.param_dtype: torch.dtype | None = None

    @property
    def pp(self) -> ProcessGroup:
        return self.dense.get_group("pp")

    @property
    def cp(self) -> ProcessGroup:
        """With cp > 1 only."""
        assert self._places is not None
        return self._places.get_group("cp")

    @property
    def tp(self) -> ProcessGroup:
        return self.dense.get_group("tp")

    @property
    def ep(self) -> ProcessGroup:
        return self.experts.get_group("ep")

    @property
    def ep_and_etp(self) -> ProcessGroup:
        """Ranks that share the experts, those with parts of the same ones side by side."""
        return self._both.get_group()

    @property
    def shards_anything(self) -> bool:
        """True if FSDP has something to share out."""
        return self.layout.dp * self.layout.cp > 1 or self.layout.edp > 1

    @property
    def stage_ranks(self) -> list[int]:
        """Ranks that share the parameters of this rank's stages; all ranks without a pipeline."""
        stage = torch.distributed.get_rank(self.pp)
        return [int(rank) for rank in self.dense.mesh[stage].flatten()]

    def holds(self, name: str) -> bool:
        """Returns True if this rank's stages have a published tensor; MTP modules have their copies of others."""
        if self.stages is None:
            return True
        held = self.stages.held(torch.distributed.get_rank(self.pp))
        if name == "model.embed_tokens.weight":
            return 0 in held
        return self.stages.stage_of(layer_of(name)) in held

    @property
    def replica(self) -> ProcessGroup | None:
        """Ranks that compute a pass without gradients together; None for all."""
        return None if self._replica is None else self._replica.get_group()

    def sharding(self, routed: bool) -> DeviceMesh:
        """Returns the mesh over which FSDP shards: with two axes where the whole is replicated, too."""
        mesh, axis = (self.experts, "edp") if routed else (self.dense, "dp_shard")
        return mesh["dp_replicate", axis] if self.layout.dp_replicate > 1 else mesh[axis]


def _mesh(axes: dict[str, int], device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def mesh_device(model: torch.nn.Module) -> str:
    """Returns the type of device that the meshes of a model are for: an accelerator's where it has no memory yet."""
    found: Any = torch.accelerator.current_accelerator()
    return next(model.parameters()).device.type.replace("meta", "cpu" if found is None else found.type)
