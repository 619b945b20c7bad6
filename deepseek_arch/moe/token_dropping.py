"""Token dropping in training (V2 report, section 2.2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.argument_types import check_types

__all__ = ["TokenDropping"]


@check_types
@dataclass(frozen=True)
class TokenDropping:
    """V2's token dropping (V2 report, section 2.2.4): no device takes more choices than its share times `factor`.

    On each device the choices with the smallest weights are dropped until the rest fits; the dropped ones contribute
    nothing. From sequences drawn with probability `spared` nothing is dropped, so that the model stays used to
    evaluation, where nothing is dropped either. In training mode only, and off by default.

    Attributes:
        factor: capacity over the mean load; V2: 1.0.
        devices: D, groups of consecutive experts.
        spared: V2: 0.1.
    """

    factor: float = 1.0
    devices: int = 1
    spared: float = 0.1

    def __post_init__(self) -> None:
        if not self.factor > 0 or self.devices < 1 or not 0 <= self.spared <= 1:
            raise ValueError(f"expected factor > 0, devices >= 1 and spared between 0 and 1, got {self}")

    @torch.no_grad()
    def drop(
        self, ids: Tensor, weights: Tensor, num_experts: int, shape: tuple[int, int], valid: Tensor | None = None
    ) -> Tensor:
        """Returns the ids [B T, K] with dropped choices replaced by `num_experts`."""
        if num_experts % self.devices:
            raise ValueError(f"expected devices that divide {num_experts} experts, got {self.devices}")
        spared = torch.rand(shape[0], device=ids.device) < self.spared
        free = spared[:, None].expand(shape).reshape(-1, 1).expand_as(ids)
        real = torch.ones_like(free) if valid is None else valid.reshape(-1, 1).expand_as(ids)
        capacity = int(self.factor * int(real.sum()) / self.devices)
        device = (ids // (num_experts // self.devices)).flatten()
        # Rank within a device: spared choices first, then by falling weight, ties by position; padding takes no place.
        rank_by = (weights.masked_fill(free, float("inf")).masked_fill(~real, float("-inf"))).flatten()
        order = rank_by.sort(descending=True, stable=True).indices
        order = order[device[order].sort(stable=True).indices]
        starts = torch.zeros(self.devices + 1, dtype=torch.int64, device=ids.device)
        starts[1:] = torch.bincount(device, minlength=self.devices).cumsum(0)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=ids.device) - starts[device[order]]
        dropped = (rank.view_as(ids) >= capacity) & real & ~free
        return ids.masked_fill(dropped, num_experts)
