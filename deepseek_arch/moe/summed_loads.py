"""Sums of the experts' loads over ranks, each of which may hold another part of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moe import Router

__all__ = ["SummedLoads", "router_keys"]


def router_keys(model: nn.Module, routers: Mapping[str, Router]) -> dict[str, str]:
    """Returns a key for each router by its name: one that is the same wherever the router's layer is held.

    The number of its decoder layer and its name below that, since a pipeline stage may count its modules from 0. A
    router that belongs to no layer has its name alone.
    """
    numbers = {name: module.layer_idx for name, module in model.named_modules() if hasattr(module, "layer_idx")}
    keys = {}
    for name in routers:
        parts = name.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        layer = next((path for path in above if path in numbers), None)
        if layer is None:
            keys[name] = name
        else:
            keys[name] = f"layer {numbers[layer]}: {name[len(layer) :].lstrip('.')}"
    return keys


class SummedLoads:
    """Sums the counts of the same routers over ranks in one collective.

    Ranks tell each other once which routers they hold, and again when a rank's own have changed.
    """

    def __init__(self) -> None:
        self._own: tuple[tuple[str, int], ...] | None = None
        self._slices: dict[str, slice] = {}
        self._total = 0

    def sum(self, model: nn.Module, routers: Mapping[str, Router], group: Any | None) -> dict[str, Tensor | None]:
        """Returns the counts of this rank's routers by name, int64 [E], summed over the ranks that hold them.

        Args:
            group: of all ranks that see different tokens; every one of them calls this.

        Raises:
            ValueError: two routers have one key, or ranks give a router different numbers of experts.
        """
        keys = router_keys(model, routers)
        own = tuple((keys[name], router.num_experts) for name, router in routers.items())
        if own != self._own:
            self._agree(own, group)
        device = next(model.parameters()).device
        counts = torch.zeros(self._total, dtype=torch.int64, device=device)
        for name, router in routers.items():
            if router.load is not None:  # one that saw no token counts as zeros: every rank takes part
                counts[self._slices[keys[name]]] = router.load.to(device)
        torch.distributed.all_reduce(counts, group=group)
        return {name: counts[self._slices[keys[name]]] for name in routers}

    def _agree(self, own: tuple[tuple[str, int], ...], group: Any | None) -> None:
        """Gives every router that a rank holds its place in the tensor that is summed, the same on all ranks."""
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, own, group=group)
        sizes: dict[str, int] = {}
        for held in gathered:  # all ranks see all, and raise alike
            if len(dict(held)) != len(held):
                raise ValueError(f"expected routers of different layers on each rank, got {[key for key, _ in held]}")
            for key, experts in held:
                if sizes.setdefault(key, experts) != experts:
                    raise ValueError(f"expected one number of experts for {key!r}, got {sizes[key]} and {experts}")
        self._slices, self._total = {}, 0
        for key, experts in sorted(sizes.items()):
            self._slices[key] = slice(self._total, self._total + experts)
            self._total += experts
        self._own = own
