"""`parallelize`: cuts a model's parameters by a layout, and makes its modules compute on their parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..attention.mla import MultiHeadLatentAttention
from ..config.argument_types import check_types
from ..layers.linear import MLP
from ..layout.parallel_layout import LayoutError, ParallelLayout
from ..models.causal_lm import DeepseekLM
from ..moe.moe import Experts, MoE, Router
from ..quant.fp8_convert import fp8_layers
from .local import become
from .tensor_parallel import ExpertParallel, HeadParallel, ReadsWhole, TokenParallelMoE, WidthParallelMLP
from .vocabulary import VocabularyEmbedding, VocabularyHead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Meshes", "parallelize"]

_ROWS = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
_COLUMNS = ("o_proj", "down_proj")


class Meshes:
    """Meshes of a layout over the ranks that run: one of everything but routed experts, and one of those.

    Args:
        layout: fits the number of ranks.
        device_type: of the parameters.

    Attributes:
        dense: axes dp_replicate, dp_shard and tp; experts: axes dp_replicate, edp and ep.
    """

    def __init__(self, layout: ParallelLayout, device_type: str) -> None:
        self.layout = layout
        dense, experts = layout.dense_mesh, layout.expert_mesh
        sizes = tuple(dense[axis] for axis in ("dp_replicate", "dp_shard", "tp"))
        self.dense = init_device_mesh(device_type, sizes, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        sizes = tuple(experts[axis] for axis in ("dp_replicate", "edp", "ep"))
        self.experts = init_device_mesh(device_type, sizes, mesh_dim_names=("dp_replicate", "edp", "ep"))
        # Ranks that see different tokens, of which each tensor-parallel rank has a group.
        self.data: ProcessGroup = self.dense["dp_replicate", "dp_shard"]._flatten("data").get_group()

    @property
    def tp(self) -> ProcessGroup:
        return self.dense.get_group("tp")

    @property
    def ep(self) -> ProcessGroup:
        return self.experts.get_group("ep")

    def sharding(self, routed: bool) -> DeviceMesh:
        """Returns the mesh over which FSDP shards: with two axes where the whole is replicated, too."""
        mesh, axis = (self.experts, "edp") if routed else (self.dense, "dp_shard")
        return mesh["dp_replicate", axis] if self.layout.dp_replicate > 1 else mesh[axis]


@check_types
def parallelize(model: DeepseekLM, layout: ParallelLayout, param_dtype: torch.dtype | None = None) -> DeepseekLM:
    """Cuts a model over the ranks of the default process group, in place; every rank calls this with the same model.

    - tp: attention by heads, MLPs and shared experts by columns, embedding and head by vocabulary. Its ranks are given
      the same tokens. The loss is computed from parts of the logits; `forward` gathers them for its output unless
      `return_logits=False`.
    - ep: routed experts, each whole on one rank. A token travels once to each rank that holds experts of its choice.
    - dp_shard, dp_replicate: FSDP2, each decoder layer and MTP module a unit, the routed experts of each a unit on a
      mesh of their own. Their ranks are given different tokens, and gradients are means over them, so that a loss which
      is a mean over a rank's rows (`global_loss` for uneven ones) trains as in one process.

    Parameters become DTensors under their own names; module classes become subclasses that compute on local parts.

    Args:
        model: a plain `DeepseekLM` with memory, or on the meta device, where only shapes are cut. FP8 layers are kept.
        layout: open sizes are filled in from the number of ranks.
        param_dtype: what FSDP casts parameters to for computing; their own dtype is that of the shards, the optimizer
            and the sums of gradients. Routers stay as they are: rounded, they would choose other experts (TRAPS S20).

    Returns:
        `model`, with `model.meshes`; `LoadBalancer` and `global_loss` sum over `model.meshes.data`.

    Raises:
        LayoutError: the layout does not fit the ranks or the model, or has an axis that is not cut here (pp, cp, etp);
            nothing has been changed or allocated then, on any rank.
        ValueError: no process group runs, or the model is of another kind, or cut already.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("expected a running process group (torch.distributed.init_process_group), got none")
    if not isinstance(model, DeepseekLM) or model.meshes is not None:
        raise ValueError(f"expected a DeepseekLM that is not cut yet, got {type(model).__name__}")
    layout = layout.for_devices(torch.distributed.get_world_size())
    _check(model, layout)
    meshes = Meshes(layout, next(model.parameters()).device.type.replace("meta", _accelerator()))
    _cut_experts(model, meshes)
    if layout.tp > 1:
        _cut_heads_and_columns(model, meshes)
    if layout.dp > 1 or layout.edp > 1 or param_dtype is not None:
        _shard(model, meshes, param_dtype)
    model.meshes = meshes
    return model


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _check(model: DeepseekLM, layout: ParallelLayout) -> None:
    """Raises LayoutError from what is the same on all ranks, so that all of them raise."""
    config, problems = model.config, []
    problems += [
        f"expected {axis} = 1, which is not cut by parallelize, got {size}"
        for axis, size in (("pp", layout.pp), ("cp", layout.cp), ("etp", layout.etp))
        if size > 1
    ]
    if layout.tp > 1 and config.attention_bias:
        problems.append(
            "expected tp = 1 for a model with attention_bias, whose output bias would be added by each rank"
        )
    if layout.tp > 1 and config.is_sparse_attention:
        problems.append("expected tp = 1 for sparse attention, whose indexer is not cut")
    if layout.tp > 1:
        problems += [
            f"expected tp = 1 with {path}, a {type(module).__name__} without a weight of its own (an adapter?)"
            for path, module in model.named_modules()
            if path.rpartition(".")[2] in _ROWS + _COLUMNS
            and "weight" not in module._parameters
            and not isinstance(module, Experts)
        ][:1]
    if max(layout.ep, layout.dp, layout.edp) > 1:
        problems += [
            f"expected ep = dp = 1 with {path}, experts inside of another module (an adapter?)"
            for path, module in model.named_modules()
            if isinstance(module, Experts) and not path.endswith("mlp.experts")
        ][:1]
    if problems:
        raise LayoutError("; ".join(problems))
    layout.validate(config, fp8_blocks=bool(fp8_layers(model)))


def _replace(module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None) -> None:
    """Makes a parameter a DTensor on a mesh of one axis: this rank's part along `dim`, or a copy on each."""
    parameter = module._parameters[name]
    assert parameter is not None
    local = parameter.detach()
    if dim is not None:
        local = local.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    placement = Replicate() if dim is None else Shard(dim)
    whole = DTensor.from_local(local, mesh, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(whole, parameter.requires_grad)


def _cut_experts(model: DeepseekLM, meshes: Meshes) -> None:
    layout, mesh = meshes.layout, meshes.experts["ep"]
    group = meshes.ep if layout.ep > 1 else None
    divisor = layout.dp / (layout.dp_replicate * layout.edp)
    for module in model.modules():
        if isinstance(module, Experts) and (layout.ep > 1 or divisor != 1):
            for name in list(module._parameters) if layout.ep > 1 else ():
                _replace(module, name, mesh, 0)
            rest = {"ep_group": group, "total_experts": module.num_experts, "divisor": divisor}
            become(module, mesh, ExpertParallel, **rest)


def _cut_heads_and_columns(model: DeepseekLM, meshes: Meshes) -> None:
    """Cuts by tp what is cut by it, and makes a copy on each rank of every other parameter but routed experts."""
    mesh, group, tied = meshes.dense["tp"], meshes.tp, model.config.tie_word_embeddings
    for path, module in list(model.named_modules()):
        if not module._parameters or isinstance(module, Experts):
            continue
        leaf = path.rpartition(".")[2]
        dim = 0 if leaf in _ROWS else 1 if leaf in _COLUMNS else None
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not (tied and module is model.lm_head):
                _replace(module, name, mesh, dim if parameter.ndim > 1 else None)
        behaviour: type | None = ReadsWhole if leaf in ("q_proj", "q_b_proj") else None
        behaviour = {"embed_tokens": VocabularyEmbedding, "lm_head": VocabularyHead}.get(leaf, behaviour)
        become(module, mesh, behaviour, **({} if behaviour is None else {"group": group}))
    if tied:
        model.lm_head._parameters["weight"] = model.model.embed_tokens._parameters["weight"]
    for path, module in model.named_modules():
        if isinstance(module, MultiHeadLatentAttention):
            become(module, mesh, HeadParallel, group=group)
        elif isinstance(module, MoE):
            become(module, mesh, TokenParallelMoE, group=group)
        elif isinstance(module, MLP) and not path.endswith(".shared_experts"):
            become(module, mesh, WidthParallelMLP, group=group)


def _shard(model: DeepseekLM, meshes: Meshes, param_dtype: torch.dtype | None) -> None:
    """Applies FSDP2: routed experts first, on the mesh of those that hold the same (TRAPS S12)."""
    layout = meshes.layout
    local = (model.config.n_routed_experts or 0) // layout.ep
    # Stacked experts fewer than shards would be padded to one for each: cut inside of them instead (TRAPS S11).
    inside: dict[str, Any] = {"shard_placement_fn": lambda parameter: Shard(1)} if layout.edp > local else {}
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=None if param_dtype is None else torch.float32)
    # Experts are given hidden states as they come, and float32 weights of the choices, which must not be cast.
    as_given = dataclasses.replace(policy, cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, Experts):
            fully_shard(module, mesh=meshes.sharding(routed=True), mp_policy=as_given, **inside)
        elif isinstance(module, Router) and param_dtype is not None:
            kept = MixedPrecisionPolicy(cast_forward_inputs=False)
            fully_shard(module, mesh=meshes.sharding(routed=False), mp_policy=kept)
    if layout.dp > 1 or param_dtype is not None:
        for layer in (*model.model.layers, *model.mtp):
            fully_shard(layer, mesh=meshes.sharding(routed=False), mp_policy=policy)
        fully_shard(model, mesh=meshes.sharding(routed=False), mp_policy=as_given)
