"""Routing as data: decisions of the routers in one forward pass, recorded, replayed and counted.

Notation: B rows, T tokens a row, E experts, K chosen per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.argument_types import shown
from .routing_record import RoutingRecord

__all__ = ["Routing"]


class Routing:
    """Settings and results of routing in one forward pass.

    Passed down through the layers as an argument. Everything here is assigned, never added up, and a layer that is
    recomputed in the backward pass writes to an object of its own (`separate`): recomputing changes nothing (TRAPS D3).

    Args:
        shape: (B, T) of the tokens.
        valid: bool [B, T], False for padding, which is neither counted nor part of any loss.
        record: keeps the decisions.
        replay: decisions to take instead of the routers' own. Weights are still the routers', and differentiable.
            Layers that the record does not have decide for themselves.
        loss: computes the balance loss of a layer (`BalanceLoss`).
        keep_logits: keeps the routers' logits.
        capacity: drops choices (`TokenDropping`).

    Attributes:
        losses, logits, counts: by layer index, the balance loss, the router's logits float32 [B T, E], and the tokens
            that chose each expert, int64 [E].
    """

    def __init__(
        self,
        shape: tuple[int, int],
        valid: Tensor | None = None,
        *,
        record: bool = False,
        replay: RoutingRecord | None = None,
        loss: Callable[..., Tensor] | None = None,
        keep_logits: bool = False,
        capacity: Any | None = None,
    ) -> None:
        if replay is not None and not isinstance(replay, RoutingRecord):
            raise ValueError(f"expected replay_routing to be a RoutingRecord, got {shown(replay)}")
        if replay is not None and replay.ids and replay.shape != tuple(shape):
            raise ValueError(f"expected recorded decisions for {list(shape)} tokens, got {list(replay.shape)}")
        self.shape, self.valid, self.replay = tuple(shape), valid, replay
        self.loss, self.keep_logits, self.capacity = loss, keep_logits, capacity
        self.record = RoutingRecord({}, {}, valid) if record else None
        self.losses: dict[int, Tensor] = {}
        self.logits: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}
        self._routers: dict[int, Any] = {}

    def restricted_to(self, valid: Tensor) -> Routing:
        """Returns the same for a layer in which only some of the tokens count; its results go to the same place.

        Args:
            valid: bool [B, T].
        """
        part = copy.copy(self)
        part.valid = valid if self.valid is None else self.valid & valid
        return part

    def separate(self) -> Routing:
        """Returns the same settings with no results yet: those of one layer, until `join` adds them."""
        part = copy.copy(self)
        part.record = None if self.record is None else RoutingRecord({}, {}, self.record.valid)
        part.losses, part.logits, part.counts, part._routers = {}, {}, {}, {}
        return part

    def join(self, part: Routing) -> None:
        """Adds the results of what `separate` returned."""
        self.losses.update(part.losses)
        self.logits.update(part.logits)
        self.counts.update(part.counts)
        self._routers.update(part._routers)
        if self.record is not None and part.record is not None:
            self.record.ids.update(part.record.ids)
            self.record.margins.update(part.record.margins)

    def replayed(self, layer: int, top_k: int, num_experts: int) -> Tensor | None:
        """Returns the decisions that layer `layer` has to take, int64 [B T, K], or None.

        Raises:
            ValueError: the record has another K, or experts that the layer does not have.
        """
        ids = None if self.replay is None else self.replay.ids.get(layer)
        if ids is None:
            return None
        if ids.shape[-1] != top_k:
            raise ValueError(
                f"expected recorded decisions of {top_k} experts for layer {layer}, got {ids.shape[-1]} experts"
            )
        ids = ids.long()
        if ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(ids))
            if low < 0 or high >= num_experts:
                raise ValueError(
                    f"expected recorded experts between 0 and {num_experts - 1} for layer {layer}, got "
                    f"{low if low < 0 else high}"
                )
        return ids.flatten(0, 1)

    def record_layer(self, layer: int, router: Any, logits: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Records and counts one layer's decisions -> the ids to use, int64 [B T, K].

        Args:
            router: the `Router`.
            logits: [B T, E]; weights, ids: [B T, K].
        """
        if self.loss is not None and router.training:
            self.losses[layer] = self.loss(router, logits, ids, self.shape, self.valid)
        if self.keep_logits:
            self.logits[layer] = logits
        if self.record is not None:
            small = torch.int16 if router.num_experts < 2**15 else torch.int32
            self.record.ids[layer] = ids.detach().to(small).unflatten(0, self.shape)
            self.record.margins[layer] = router.margins(logits.detach()).unflatten(0, self.shape)
        if self.capacity is not None and router.training:
            ids = self.capacity.drop(ids, weights.detach(), router.num_experts, self.shape, self.valid)
        self.counts[layer] = count_choices(ids, router.num_experts, self.valid)
        self._routers[layer] = router
        return ids

    def differentiable(self, layer: int) -> tuple[Tensor, ...]:
        """Returns what was kept of a layer and is differentiated: its logits and its balance loss, where there are any.

        A layer that is recomputed by `use_reentrant=True` runs forward without gradients, and only its outputs are
        connected to the graph. It returns these tensors therefore, and its caller gives them to `replace`.
        """
        return tuple(kept[layer] for kept in (self.logits, self.losses) if layer in kept)

    def replace(self, layer: int, tensors: Sequence[Tensor]) -> None:
        """Puts tensors that a layer returned in the place of those that it kept while it ran; see `differentiable`."""
        names = [kept for kept in (self.logits, self.losses) if layer in kept]
        for kept, tensor in zip(names, tensors, strict=True):
            kept[layer] = tensor

    def commit(self) -> None:
        """Adds the counts of this pass to the routers in training mode; once, after the pass.

        Not without gradients: text that a model in training mode generates is not trained on (TRAPS D3).
        """
        if not torch.is_grad_enabled():
            return
        for layer, router in self._routers.items():
            if router.training:
                counts = self.counts[layer]
                router.load = counts if router.load is None else router.load.to(counts.device) + counts

    def total_loss(self, layers: Container[int]) -> Tensor | None:
        """Returns the sum of the balance losses of these layers, or None where none was computed."""
        losses = [loss for layer, loss in self.losses.items() if layer in layers]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None


@torch.no_grad()
def count_choices(ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """Counts the tokens that chose each expert, int64 [E], padding excluded (TRAPS D2, D3).

    Args:
        ids: [N, K]; the value `num_experts` (dropped, or served elsewhere) is not counted.
        valid: bool, N values, or None.
    """
    real = torch.ones_like(ids) if valid is None else valid.reshape(-1, 1).expand_as(ids).long()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids.flatten().long(), real.flatten().to(ids.device))[:num_experts]
