"""Ways of tokens to their experts by name, those of users among them; and a row for each choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..config.argument_types import check_types
from ..layout.parallel_layout import LayoutError
from .collectives import all_to_all
from .dispatch import COMBINE, DISPATCH, dispatched
from .meshes import Meshes
from .tensor_parallel import ExpertParallel

__all__ = ["ExpertDispatch", "register_dispatch", "use_dispatch"]


class ExpertDispatch(Protocol):
    """Sends tokens to the ranks of their experts, and returns weighted sums."""

    def __call__(self, experts: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Computes the weighted sum of each token's experts -> [T, H] in the dtype of x, differentiably.

        Every rank of the group calls this the same number of times, those without tokens as well.

        Args:
            experts: function of rows [N, H], this rank's experts int64 [N, K'] and weights float32 [N, K'] -> the
                weighted sums [N, H]. The value `num_experts / ranks` marks a choice that another rank serves.
            x: [T, H].
            ids: int64 [T, K], of all experts; the value `num_experts` marks a dropped choice.
            weights: float32 [T, K].
        """


_FACTORIES: dict[str, Callable[..., ExpertDispatch]] = {}


@check_types
def register_dispatch(name: str, factory: Callable[..., ExpertDispatch]) -> None:
    """Makes a way of dispatching tokens known to `use_dispatch`; a name that is known is replaced.

    Args:
        factory: function of the `Meshes` of the model, the number of all experts, and the options that `use_dispatch`
            was given -> an `ExpertDispatch` over the ranks of `meshes.ep`. Every rank calls it.
    """
    _FACTORIES[name] = factory


@check_types
def use_dispatch(model: nn.Module, name: str, **options: Any) -> None:
    """Changes how the tokens of an expert-parallel model travel; every rank calls this.

    - "rows" (the default): a row for each token and rank that serves it; ids and weights travel along, sums return.
    - "choices": a row for each choice, which comes back as it is and is weighted where the token lives. More bytes,
      but one rounding as in one process: sums over choices are not rounded by rank.
    - "nodes": as "rows" in two hops, to each node that serves a token and from there to its ranks, as the option
      `ranks_per_node` cuts the ep group. A token crosses the network once for each node.

    Args:
        model: cut by `parallelize` or `pipeline`, or read by `load(layout=)`, with ep > 1.
        name: one of these, or of `register_dispatch`.
        options: of the factory.

    Raises:
        ValueError: an unknown name or wrong options, or a model that is not cut by ep.
    """
    if name not in _FACTORIES:
        more = ""
        if name == "deepep":
            more = (
                " (DeepEP: install deep_ep from github.com/deepseek-ai/DeepEP, and register a function that calls it)"
            )
        raise ValueError(f"expected a dispatch of {', '.join(_FACTORIES)}, got {name!r}{more}")
    meshes: Meshes | None = getattr(model, "meshes", None)
    cut = [module for module in model.modules() if isinstance(module, ExpertParallel)]
    if meshes is None or meshes.layout.ep == 1 or not isinstance(meshes, Meshes):
        raise ValueError("expected a model that is cut by ep > 1, got another one")
    # A stage of a pipeline may have no experts: what makes groups is called on all ranks.
    config: Any = model.config
    totals = {module.total_experts for module in cut} or {config.n_routed_experts}
    if len(totals) > 1:
        raise ValueError(f"expected the same number of experts in every layer, got {sorted(totals)}")
    for total in totals:
        way = _FACTORIES[name](meshes, total, **options)
        for module in cut:
            module.dispatch = way


def _rows(meshes: Meshes, num_experts: int) -> ExpertDispatch:
    def way(experts: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return dispatched(experts, x, ids, weights, num_experts, meshes.ep_and_etp, parts=meshes.layout.etp)

    return way


def _nodes(meshes: Meshes, num_experts: int, ranks_per_node: int) -> ExpertDispatch:
    ep = meshes.layout.ep
    _check_whole(meshes, "nodes")
    if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, int) or ranks_per_node < 1:
        raise LayoutError(f"expected ranks_per_node to be an integer >= 1, got {ranks_per_node!r}")
    if ep % ranks_per_node:
        raise LayoutError(f"expected ranks_per_node = {ranks_per_node} to divide ep = {ep}")
    sizes = meshes.layout.expert_mesh
    axes = {**{axis: sizes[axis] for axis in ("pp", "dp_replicate", "edp")}, "node": ep // ranks_per_node}
    axes |= {"local": ranks_per_node, "etp": sizes["etp"]}
    mesh = init_device_mesh(meshes.experts.device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    between, within = mesh.get_group("node"), mesh.get_group("local")
    of_node = num_experts // axes["node"]

    def way(experts: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        def node(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return dispatched(experts, rows, ids, weights, of_node, within)

        return dispatched(node, x, ids, weights, num_experts, between, " between nodes")

    return way


def _check_whole(meshes: Meshes, name: str) -> None:
    if meshes.layout.etp > 1:
        raise LayoutError(f"expected etp = 1 for dispatch {name!r}, got {meshes.layout.etp}")


def _choices(meshes: Meshes, num_experts: int) -> ExpertDispatch:
    _check_whole(meshes, "choices")

    def way(experts: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return _dispatched_by_choice(experts, x, ids, weights, num_experts, meshes.ep)

    return way


def _dispatched_by_choice(
    experts: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, group: Any
) -> Tensor:
    """Computes as `dispatched`, with a row for each choice, in the order of experts: their counts stand for ids."""
    ranks, choices = dist.get_world_size(group), ids.shape[1]
    local, flat = num_experts // ranks, ids.flatten()
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].view(ranks, local)
    came = torch.empty_like(counts)
    dist.all_to_all_single(came, counts.contiguous(), group=group)
    sent, received = counts.sum(1).tolist(), came.sum(1).tolist()
    order = flat.argsort(stable=True)[: sum(sent)]  # dropped choices are the last
    rows = all_to_all(x[order // choices], received, sent, group, DISPATCH)
    own = torch.arange(local, device=ids.device).repeat(ranks).repeat_interleave(came.flatten())[:, None]
    out = experts(rows, own, torch.ones_like(own, dtype=weights.dtype))
    back = all_to_all(out, sent, received, group, COMBINE)
    places = order.new_full((len(flat),), len(order)).scatter_(0, order, torch.arange(len(order), device=ids.device))
    wide = back.to(torch.promote_types(back.dtype, weights.dtype))
    padded = torch.cat((wide, wide.new_zeros(1, wide.shape[1])))
    total = wide.new_zeros(x.shape)
    for place, weight in zip(places.view(ids.shape).unbind(1), weights.unbind(1), strict=True):
        total = total + padded[place] * weight[:, None]
    return total.to(back.dtype)


_FACTORIES.update(rows=_rows, choices=_choices, nodes=_nodes)
