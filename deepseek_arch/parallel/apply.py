"""`parallelize`: cuts a model's parameters by a layout, and makes its modules compute on their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..attention.mla import MultiHeadLatentAttention
from ..config.argument_types import check_types
from ..layers.linear import MLP
from ..layout.parallel_layout import LayoutError, ParallelLayout
from ..models.causal_lm import DeepseekLM
from ..moe.moe import Experts, MoE, Router
from ..quant.fp8_convert import fp8_layers
from .call_agreement import AgreesOnCalls
from .context_parallel import ContextParallelAttention, ContextParallelLM, ContextParallelModel
from .local import become, behave
from .meshes import Meshes, mesh_device
from .tensor_parallel import ExpertParallel, HeadParallel, HoldsBias, ReadsWhole, TokenParallelMoE, WidthParallelMLP
from .vocabulary import VocabularyEmbedding, VocabularyHead

if TYPE_CHECKING:
    from .stages import Stage

__all__ = ["check_layout", "cut", "parallelize", "shard_stages"]

_ROWS = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
_COLUMNS = ("o_proj", "down_proj")


@check_types
def parallelize(model: DeepseekLM, layout: ParallelLayout, param_dtype: torch.dtype | None = None) -> DeepseekLM:
    """Cuts a model over the ranks of the default process group, in place; every rank calls this with the same model.

    - tp: attention by heads, MLPs and shared experts by columns, embedding and head by vocabulary. Its ranks are given
      the same tokens. The loss is computed from parts of the logits; `forward` gathers them for its output unless
      `return_logits=False`.
    - ep: routed experts, each whole on one rank. A token travels once to each rank that holds experts of its choice.
    - cp: each rank computes a part of every sequence; all ranks of a group are given the same whole sequences, of a
      multiple of 2 x cp tokens. Losses are those of whole sequences, the same on all of them; FSDP shards over cp, too.
      Hidden states that are returned are of this rank's tokens, logits (unless `return_logits=False`) of all.
    - etp: columns of each routed expert; a token's row goes to all ranks that have a part of an expert of its choice.
    - dp_shard, dp_replicate: FSDP2, each decoder layer and MTP module a unit, the routed experts of each a unit on a
      mesh of their own. Their ranks are given different tokens, and gradients are means over them, so that a loss which
      is a mean over a rank's rows (`global_loss` for uneven ones) trains as in one process.

    Parameters become DTensors under their own names; module classes become subclasses that compute on local parts.

    All ranks begin a pass together (with gradients disabled or in eval mode those of one replica): an argument that is
    wrong on one, or that differs where ranks compute parts of the same sequences, is a ValueError on all. What only
    computing shows, such as memory that runs out, is the error of one rank; the others fail when its process ends, or
    after the process group's time limit.

    Args:
        model: a plain `DeepseekLM` with memory, or on the meta device, where only shapes are cut. FP8 layers are kept.
        layout: open sizes are filled in from the number of ranks.
        param_dtype: what FSDP casts parameters to for computing; their own dtype is that of the shards, the optimizer
            and the sums of gradients. Routers stay as they are: rounded, they would choose other experts (TRAPS S20).
            Not with FP8 layers, which compute in the dtype of what they are given.

    Returns:
        `model`, with `model.meshes`; `LoadBalancer` and `global_loss` sum over `model.meshes.data`.

    Raises:
        LayoutError: the layout does not fit the ranks or the model, or pp > 1, which is for `pipeline`; nothing
            has been changed or allocated then, on any rank.
        ValueError: no process group runs, or the model is of another kind, or cut already.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("expected a running process group (torch.distributed.init_process_group), got none")
    if not isinstance(model, DeepseekLM) or model.meshes is not None:
        raise ValueError(f"expected a DeepseekLM that is not cut yet, got {type(model).__name__}")
    layout = layout.for_devices(torch.distributed.get_world_size())
    if layout.pp > 1:
        raise LayoutError(f"expected pp = 1 (pipeline cuts into stages), got {layout.pp}")
    check_layout(model, layout, param_dtype)
    meshes = Meshes(layout, mesh_device(model))
    meshes.param_dtype = param_dtype
    cut(model, meshes)
    behave(model, AgreesOnCalls)
    if meshes.shards_anything or param_dtype is not None:
        _shard(model, meshes, param_dtype)
    model.meshes = meshes
    return model


def check_layout(model: DeepseekLM, layout: ParallelLayout, param_dtype: torch.dtype | None = None) -> None:
    """Raises LayoutError from what is the same on all ranks, so that all of them raise."""
    config, problems, in_fp8 = model.config, [], fp8_layers(model)
    if param_dtype is not None and in_fp8:
        problems.append(
            f"expected param_dtype None with weights in FP8 ({next(iter(in_fp8))}), whose codes would be cast without "
            f"their scales, got {param_dtype}: load with that dtype"
        )
    if layout.cp > 1 and config.is_sparse_attention:
        problems.append("expected cp = 1 for sparse attention, whose indexer's keys are not gathered")
    if layout.cp > 1 and model.capacity is not None:
        problems.append("expected cp = 1 with token dropping, whose capacity is of whole sequences")
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
    layout.validate(config, fp8_blocks=bool(in_fp8))


def cut(model: DeepseekLM, meshes: Meshes) -> None:
    """Cuts experts by ep, and by tp what it cuts; without FSDP."""
    _cut_experts(model, meshes)
    if meshes.layout.tp > 1:
        _cut_heads_and_columns(model, meshes)
    if meshes.layout.cp > 1:
        behave(model, ContextParallelLM)
        behave(model.model, ContextParallelModel, cp_group=meshes.cp)
        for module in model.modules():
            if isinstance(module, MultiHeadLatentAttention):
                behave(module, ContextParallelAttention, cp_group=meshes.cp)


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
    """Gives each rank its experts (ep), or a part of each of them (etp)."""
    layout, cuts = meshes.layout, meshes.layout.ep * meshes.layout.etp > 1
    mesh = meshes.experts["ep"] if layout.etp == 1 else meshes.experts["ep", "etp"]
    divisor = layout.dp * layout.cp / (layout.dp_replicate * layout.edp)
    for module in model.modules():
        if isinstance(module, Experts) and (cuts or divisor != 1):
            for name in list(module._parameters) if cuts else ():
                if layout.etp == 1:
                    _replace(module, name, mesh, 0)
                else:
                    _cut_inside(module, name, mesh)
            group = meshes.ep_and_etp if cuts else None
            rest = {"ep_group": group, "total_experts": module.num_experts, "divisor": divisor, "parts": layout.etp}
            become(module, mesh, ExpertParallel, **rest)


def _cut_inside(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Makes stacked weights, or scales, a DTensor on a mesh of ep and etp.

    Rows of gate and of up are cut each, never across (TRAPS S2), and columns of down.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    ep, etp = mesh.get_coordinate() or (0, 0)
    local = parameter.detach().chunk(mesh.size(0), 0)[ep]
    if name.startswith("gate_up"):
        local = local.unflatten(1, (2, -1)).chunk(mesh.size(1), 2)[etp].flatten(1, 2)
        inner: Placement = _StridedShard(1, split_factor=2)
    else:
        local, inner = local.chunk(mesh.size(1), 2)[etp], Shard(2)
    local = local.clone(memory_format=torch.contiguous_format)
    whole: dict[str, Any] = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    module._parameters[name] = nn.Parameter(
        DTensor.from_local(local, mesh, [Shard(0), inner], **whole), parameter.requires_grad
    )


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
        if leaf == "o_proj" and module._parameters.get("bias") is not None:
            behaviour = HoldsBias
        behaviour = {"embed_tokens": VocabularyEmbedding, "lm_head": VocabularyHead}.get(leaf, behaviour)
        become(module, mesh, behaviour, **({} if behaviour is None else {"group": group}))
    if tied and model.lm_head is not None:  # a stage of a pipeline may have none
        model.lm_head._parameters["weight"] = model.model.embed_tokens._parameters["weight"]
    for path, module in model.named_modules():
        if isinstance(module, MultiHeadLatentAttention):
            become(module, mesh, HeadParallel, group=group)
        elif isinstance(module, MoE):
            become(module, mesh, TokenParallelMoE, group=group)
        elif isinstance(module, MLP) and not path.endswith(".shared_experts"):
            become(module, mesh, WidthParallelMLP, group=group)


def _shard(model: DeepseekLM, meshes: Meshes, param_dtype: torch.dtype | None) -> None:
    """Applies FSDP2: routed experts first, on the mesh of those that hold the same (TRAPS S12).

    All of them give weights back after a forward pass. By default roots of FSDP do not: that is each layer's experts
    where they alone are shared, and an optimizer that is made after a pass would get what is gathered.
    """
    policy, as_given = _policies(param_dtype)
    again: dict[str, Any] = {"reshard_after_forward": True}
    _shard_experts(model, meshes, param_dtype, **again)
    if meshes.layout.dp * meshes.layout.cp > 1 or param_dtype is not None:
        again["mesh"] = meshes.sharding(routed=False)
        for layer in (*model.model.layers, *model.mtp):
            fully_shard(layer, mp_policy=policy, **again)
        fully_shard(model, mp_policy=as_given, **again)


def _policies(param_dtype: torch.dtype | None) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Returns the policy of layers, and the same for modules that are given their inputs as they are to be."""
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=None if param_dtype is None else torch.float32)
    return policy, dataclasses.replace(policy, cast_forward_inputs=False)


def _shard_experts(model: DeepseekLM, meshes: Meshes, param_dtype: torch.dtype | None, **options: Any) -> None:
    """Shards routed experts, and apart from their layers the routers where those are cast (TRAPS S20).

    Experts are given hidden states as they come, and float32 weights of the choices, which must not be cast.
    """
    layout, (_, as_given) = meshes.layout, _policies(param_dtype)
    for module in list(model.modules()) if param_dtype is not None else ():
        if isinstance(module, Router):
            kept = MixedPrecisionPolicy(cast_forward_inputs=False)
            fully_shard(module, mesh=meshes.sharding(routed=False), mp_policy=kept, **options)
    local = (model.config.n_routed_experts or 0) // layout.ep
    # Stacked experts fewer than shards would be padded to one for each: cut inside of them instead (TRAPS S11).
    if layout.edp > local:
        options["shard_placement_fn"] = _inside
    for module in list(model.modules()):
        if isinstance(module, Experts):
            fully_shard(module, mesh=meshes.sharding(routed=True), mp_policy=as_given, **options)


def _inside(parameter: nn.Parameter) -> Shard:
    """Returns the cut of stacked experts by FSDP inside of them: not where etp has cut gate and up."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return Shard(2 if any(isinstance(placement, _StridedShard) for placement in placements) else 1)


def shard_stages(model: DeepseekLM, stages: Sequence[Stage], meshes: Meshes, param_dtype: torch.dtype | None) -> None:
    """Applies FSDP2 to pipeline stages, each a root that torch's schedules gather and reduce themselves.

    Weights stay gathered while a schedule needs their stage: it asks a stage for its parameters in split backward
    passes, and would find shards that no pass has reached. An embedding that two stages of this rank share would have
    two roots: every rank keeps it whole, and casts it where it is read.
    """
    options: dict[str, Any] = {"mesh": meshes.sharding(routed=False), "reshard_after_forward": False}
    policy, as_given = _policies(param_dtype)
    _shard_experts(model, meshes, param_dtype, reshard_after_forward=False)
    for layer in (*model.model.layers, *model.mtp):
        fully_shard(layer, mp_policy=policy, **options)
    shared = [stage for stage in stages if hasattr(stage, "embed_tokens")]
    ignored: set[Any] = set()
    if len(shared) > 1:
        embedding = model.model.embed_tokens
        if meshes.layout.tp == 1:  # a DTensor as all others are
            _replace(embedding, "weight", meshes.different, None)
            become(embedding, meshes.different)
            if model.config.tie_word_embeddings:
                model.lm_head._parameters["weight"] = embedding._parameters["weight"]
                become(model.lm_head, meshes.different)
        ignored = {embedding._parameters["weight"]}
        for module in (embedding, model.lm_head) if model.config.tie_word_embeddings else (embedding,):
            module.__dict__["reads_as"] = param_dtype
    for stage in stages:
        fully_shard(stage, ignored_params=ignored, mp_policy=as_given, **options)
