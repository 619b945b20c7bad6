"""Tensor parallelism: this rank's heads of attention, its columns of MLPs, and the experts' inputs and outputs.

What all heads share (latents, and the rotated key) is computed on every rank, and its gradients are summed where the
heads read it: 1536 + 512 + 64 values a token for V3 instead of the 7168 of the block's input (TRAPS S1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers.rope import Rotation
from ..moe.routing import Routing
from .collectives import copy_in, reduce_over, sum_out
from .dispatch import dispatched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ExpertParallel", "HeadParallel", "HoldsBias", "ReadsWhole", "TokenParallelMoE", "WidthParallelMLP"]

PURPOSE = "tensor parallel"


class ReadsWhole:
    """A linear layer of this rank's rows, whose input all ranks share."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(copy_in(x, self.group, PURPOSE))  # type: ignore[misc]


class HoldsBias:
    """A linear layer of this rank's columns, which leaves its bias to who adds up the ranks' parts."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["bias"] = None  # before the parameter, which FSDP and others read by the same name
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            del self.__dict__["bias"]


class HeadParallel:
    """Latent attention of this rank's heads."""

    group: ProcessGroup

    def append_to_cache(self, x: Tensor, rope: Rotation, cache: Any | None) -> Tensor | tuple[Tensor, Tensor]:
        states = super().append_to_cache(x, rope, cache)  # type: ignore[misc]
        if not isinstance(states, tuple):
            return copy_in(states, self.group, PURPOSE)
        joined = copy_in(torch.cat(states, -1), self.group, PURPOSE)
        latents, keys = joined.split([state.shape[-1] for state in states], -1)
        return latents, keys

    def forward(
        self, x: Tensor, rope: Rotation, mask: Tensor | None = None, cache: Any | None = None, *selection: Any
    ) -> Tensor:
        """As the class's own; of sparse attention, each rank has the whole indexer and selects the same keys."""
        out = sum_out(super().forward(x, rope, mask, cache, *selection), self.group, PURPOSE)  # type: ignore[misc]
        projection: Any = self.o_proj  # type: ignore[attr-defined]
        return out + projection.bias if isinstance(projection, HoldsBias) else out

    def mass(self, q: Tensor, expanded: Tensor, rotated: Tensor, seen: Tensor) -> Tensor:
        """Returns the mass of the heads of all ranks; each rank has as many.

        The same on all of them, and so are the loss and the gradients of each rank's whole indexer.
        """
        mass = super().mass(q, expanded, rotated, seen)  # type: ignore[misc]
        return reduce_over(mass, self.group, "indexer training") / torch.distributed.get_world_size(self.group)


class WidthParallelMLP:
    """A dense MLP of this rank's columns."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(copy_in(x, self.group, PURPOSE))  # type: ignore[misc]
        return sum_out(out, self.group, PURPOSE)


class TokenParallelMoE:
    """Experts whose tokens the ranks of a tensor-parallel group share out, beside their columns of the shared experts.

    All of them route all tokens, alike, and so token dropping must not spare sequences at random. Each sends its part
    of the tokens to the routed experts; one sum at the end joins those parts and the shared experts' columns.
    """

    group: ProcessGroup

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        gate, layer_idx = self.gate, self.layer_idx  # type: ignore[attr-defined]
        dropping = None if routing is None else routing.capacity
        if dropping is not None and gate.training and 0 < dropping.spared < 1:  # TRAPS S5
            raise ValueError(
                f"expected token dropping with spared 0 or 1 where tp > 1 (ranks draw apart), got {dropping.spared}"
            )
        _, weights, ids = gate(x) if routing is None else gate(x, None, routing, layer_idx)
        whole, rows = copy_in(x, self.group, PURPOSE), x.shape[:-1].numel()
        weights = copy_in(weights, self.group, "routing weights")
        ranks, rank = torch.distributed.get_world_size(self.group), torch.distributed.get_rank(self.group)
        first, end = rows * rank // ranks, rows * (rank + 1) // ranks
        mine = slice(first, end)
        part = self.experts(whole.reshape(rows, -1)[mine], ids[mine], weights[mine])  # type: ignore[attr-defined]
        out = torch.nn.functional.pad(part, (0, 0, first, rows - end)).view(x.shape)
        if self.shared_experts is not None:  # type: ignore[attr-defined]
            out = out + self.shared_experts(whole)  # type: ignore[attr-defined]
        return sum_out(out, self.group, PURPOSE)


class ExpertParallel:
    """Routed experts of this rank, for the tokens of all ranks of `ep_group`.

    Attributes:
        ep_group: ranks of ep and etp; None where each rank has all experts.
        parts: ranks that hold a part each of the same experts (etp).
        total_experts: of all ranks.
        dispatch: way of the tokens, None for `dispatch.dispatched` (`dispatch_choice.use_dispatch`).
        divisor: by which gradients of the experts are divided beyond what FSDP divides them by. Tokens of all
            data-parallel ranks meet in an expert, however few ranks hold it (TRAPS S7).
    """

    ep_group: ProcessGroup | None
    total_experts: int
    divisor: float
    parts: int = 1
    dispatch: Any = None

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        if self.ep_group is None:
            return self.own_experts(x, expert_ids, weights)
        if self.dispatch is not None:
            return self.dispatch(self.own_experts, x, expert_ids, weights)
        total, group = self.total_experts, self.ep_group
        return dispatched(self.own_experts, x, expert_ids, weights, total, group, parts=self.parts)

    def own_experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Computes `Experts.forward` with this rank's experts; their gradients alone are divided."""
        x, weights = _scale_gradient(x, self.divisor), _scale_gradient(weights, self.divisor)
        out = super().forward(x, expert_ids, weights)  # type: ignore[misc]
        return _scale_gradient(out, 1 / self.divisor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 or not (torch.is_grad_enabled() and x.requires_grad) else _ScaledGradient.apply(x, factor)
