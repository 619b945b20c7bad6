"""Balanced experts: the bias updates of V3 and Moonlight, the balance losses of V2 and V3, and V2's token dropping.

Notation: T tokens of a sequence, E routed experts, K chosen per token, D devices of E / D experts each, M devices
that a token may be sent to (`topk_group`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import DeepseekConfig
from .moe import Router
from .telemetry import LoadReport

__all__ = [
    "BalanceLoss",
    "Capacity",
    "LoadBalancer",
    "expert_loads",
    "routers",
]


# ---------------------------------------------------------------- losses


@dataclass(frozen=True)
class BalanceLoss:
    """The weighted balance losses of one layer, each a mean over the sequences of the batch.

    Being means over sequences, they depend neither on the batch size nor on how a batch is cut for accumulation
    (TRAPS D7). A sequence is a row; its padding counts nowhere.

    Attributes:
        sequence: alpha of V3's sequence-wise loss (equations 17 to 20): sum over experts of f P, where P is the mean
            over tokens of the scores, normalized over all experts, and f the share of choices times E, without
            gradient. Perfect balance gives alpha.
        counts: what f counts: "unbiased", the K best raw scores, as the equations are printed, or "routed", the
            experts that were chosen, as most implementations do (TRAPS D6).
        expert, device, communication: alpha_1 to alpha_3 of V2's losses (equations 23 to 31), of the experts chosen.
        devices: D, for the last two; E must be a multiple.
    """

    sequence: float = 0.0
    counts: str = "unbiased"
    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    devices: int = 1

    def __post_init__(self) -> None:
        if self.counts not in ("unbiased", "routed"):
            raise ValueError(f"expected counts 'unbiased' or 'routed', got {self.counts!r}")
        for name in ("sequence", "expert", "device", "communication"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        if self.devices < 1:
            raise ValueError(f"expected devices >= 1, got {self.devices}")

    @classmethod
    def from_config(cls, config: DeepseekConfig) -> BalanceLoss:
        """What the config says, else what its family was trained with.

        `aux_loss_alpha` if the config has it. V3's published configs have none, which does not mean zero (TRAPS D8):
        then 1e-4 (V3 report, section 4.2), and 1e-3 for V2's routings (V2's published configs). V2's files count the
        experts chosen, V3's equation does not.
        """
        sigmoid = config.topk_method == "noaux_tc"
        alpha = config.aux_loss_alpha
        if alpha is None:
            alpha = 1e-4 if sigmoid else 1e-3
        return cls(sequence=alpha, counts="unbiased" if sigmoid else "routed")

    @property
    def active(self) -> bool:
        return bool(self.sequence or self.expert or self.device or self.communication)

    def __call__(
        self, router: Router, logits: Tensor, ids: Tensor, shape: tuple[int, int], valid: Tensor | None = None
    ) -> Tensor:
        """The loss of one layer, a float32 scalar.

        Args:
            logits: float32 [B T, E].
            ids: int64 [B T, K].
            shape: (B, T).
            valid: bool [B, T], or None where nothing is padding.
        """
        scores = router.scores(logits).unflatten(0, shape)  # [B, T, E]
        ids = ids.unflatten(0, shape)  # [B, T, K]
        mask = torch.ones(shape, dtype=torch.bool, device=logits.device) if valid is None else valid
        total = logits.new_zeros(())
        if self.sequence:
            normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            counted = scores.detach().topk(ids.shape[-1], dim=-1).indices if self.counts == "unbiased" else ids
            f, p = _load(counted, scores.shape[-1], mask), _mean(normalized, mask)
            total = total + self.sequence * _mean_over_sequences((f * p).sum(-1), mask)
        if self.expert or self.device or self.communication:
            f, p = _load(ids, scores.shape[-1], mask), _mean(scores, mask)
            total = total + self.expert * _mean_over_sequences((f * p).sum(-1), mask)
        if self.device or self.communication:
            if scores.shape[-1] % self.devices:
                raise ValueError(f"expected devices that divide {scores.shape[-1]} experts, got {self.devices}")
            on_device = p.unflatten(-1, (self.devices, -1)).sum(-1)  # P' = P'' [B, D]
            mean_load = f.unflatten(-1, (self.devices, -1)).mean(-1)
            total = total + self.device * _mean_over_sequences((mean_load * on_device).sum(-1), mask)
            sent = _sent(ids, scores.shape[-1], self.devices, router.topk_group, mask)
            total = total + self.communication * _mean_over_sequences((sent * on_device).sum(-1), mask)
        return total


def _tokens(mask: Tensor) -> Tensor:
    return mask.sum(-1, keepdim=True).clamp(min=1).float()  # [B, 1]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T, X] -> [B, X], over the real tokens."""
    return (values * mask[..., None]).sum(1) / _tokens(mask)


@torch.no_grad()
def _load(ids: Tensor, experts: int, mask: Tensor) -> Tensor:
    """f [B, E]: the share of a sequence's tokens that chose each expert, times E / K."""
    chosen = torch.zeros(*ids.shape[:2], experts, device=ids.device).scatter_(-1, ids.clamp(max=experts - 1), 1.0)
    return _mean(chosen, mask) * experts / ids.shape[-1]


@torch.no_grad()
def _sent(ids: Tensor, experts: int, devices: int, most: int, mask: Tensor) -> Tensor:
    """f'' [B, D]: the share of a sequence's tokens that were sent to each device, times D / M."""
    to = torch.zeros(*ids.shape[:2], devices, device=ids.device).scatter_(-1, ids // (experts // devices), 1.0)
    return _mean(to, mask) * devices / most


def _mean_over_sequences(values: Tensor, mask: Tensor) -> Tensor:
    """[B] -> scalar, over the sequences that have a real token."""
    real = mask.any(-1)
    return (values * real).sum() / real.sum().clamp(min=1)


# ---------------------------------------------------------------- token dropping


@dataclass(frozen=True)
class Capacity:
    """V2's token dropping (V2 report, section 2.2.4): no device takes more choices than its share times `factor`.

    On each device the choices with the smallest weights are dropped until the rest fits; the dropped ones contribute
    nothing. Sequences drawn with probability `spared` are never dropped from, so that the model stays used to
    evaluation, where nothing is. In training mode only, and off unless asked for.

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
        """The ids with the dropped choices replaced by `num_experts`, [B T, K]."""
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


# ---------------------------------------------------------------- bias updates


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by module name, prediction layers' included (TRAPS F9)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def expert_loads(model: nn.Module) -> dict[str, Tensor]:
    """What each router has counted since the last step, int64 [E] each; routers that saw no token are left out."""
    return {name: router.load for name, router in routers(model).items() if router.load is not None}


class LoadBalancer:
    """Auxiliary-loss-free balancing (V3 report, section 2.1.2; arXiv 2408.15664): biases instead of gradients.

    Routers count, in training mode, the tokens that they really route; `step`, called after the optimizer's, moves each
    `e_score_correction_bias` against the load and empties the counts. Calling it once per optimizer step makes the
    update independent of gradient accumulation and recomputation (TRAPS D1, D3). Where torch.distributed runs, counts
    are summed over `group` first (TRAPS D2).

    Args:
        model: any module tree with `Router`s; those without a bias (V2's routings) are counted and reported only.
        rate: gamma, a number or a function of the step (from 0). V3: 0.001, then 0 for the last 500B tokens. Freezing
            the biases, as is usual in fine-tuning, is rate 0.
        form: "sign", b += gamma sign(mean load - load), V3's; or "centred", which subtracts the mean of the signs from
            each, Moonlight's. Neither recentres what was loaded (TRAPS D4).
        group: the process group of all ranks that see different tokens; None for the default one.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float | Callable[[int], float] = 1e-3,
        form: str = "sign",
        group: Any | None = None,
    ) -> None:
        if form not in ("sign", "centred"):
            raise ValueError(f"expected form 'sign' or 'centred', got {form!r}")
        self.routers = routers(model)
        if not self.routers:
            raise ValueError(f"expected a model with routers, got {type(model).__name__} without any")
        self.rate, self.form, self.group = rate, form, group
        self.steps = 0

    @torch.no_grad()
    def step(self) -> LoadReport:
        """One update of all biases; what was counted for it."""
        rate = self.rate(self.steps) if callable(self.rate) else self.rate
        loads = {}
        for name, router in self.routers.items():
            load = router.load
            if _distributed():
                if load is None:  # every rank takes part, whether it saw tokens or not
                    load = torch.zeros(router.num_experts, dtype=torch.int64, device=router.weight.device)
                torch.distributed.all_reduce(load, group=self.group)
            router.load = None
            if load is None or not int(load.sum()):
                continue
            loads[name] = load
            bias = router.e_score_correction_bias
            if bias is not None and rate:
                bias += rate * self._direction(load).to(bias.device)
        self.steps += 1
        return LoadReport(loads, rate)

    def _direction(self, load: Tensor) -> Tensor:
        # In integers: a mean in floating point could turn the sign of an expert that has exactly its share.
        sign = torch.sign(load.sum() - load * len(load)).float()
        return sign - sign.mean() if self.form == "centred" else sign

    def state_dict(self) -> dict[str, int]:
        """The biases are in the model's own state dict; this is the step that a rate schedule needs."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.steps = int(state["steps"])


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
