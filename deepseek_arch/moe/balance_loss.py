"""Balance losses of the router: sequence-wise (V3 report, equations 17 to 20) and those of V2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from .moe import Router

__all__ = ["BalanceLoss"]


_Over = Callable[[Tensor], Tensor]


def _alone(x: Tensor) -> Tensor:
    return x


@check_types
@dataclass(frozen=True)
class BalanceLoss:
    """The weighted balance losses of one layer, each a mean over the sequences of the batch.

    Being means over sequences, they depend neither on the batch size nor on how a batch is cut for accumulation
    (TRAPS D7). A sequence is a row; its padding counts nowhere.

    Attributes:
        sequence: alpha of V3's sequence-wise loss (equations 17 to 20): sum over experts of f P, where P is the mean
            over tokens of the scores, normalized over all experts, and f the share of choices times E, without
            gradient. Perfect balance gives alpha.
        counts: the experts that f counts: "unbiased", the K best raw scores, as in the printed equations, or "routed",
            the experts that were chosen, as in most implementations (TRAPS D6).
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
    @check_types
    def from_config(cls, config: DeepseekConfig) -> BalanceLoss:
        """Returns the loss of the config, else of the training of its family.

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
        """True if any of the losses has a weight."""
        return bool(self.sequence or self.expert or self.device or self.communication)

    def __call__(
        self,
        router: Router,
        logits: Tensor,
        ids: Tensor,
        shape: tuple[int, int],
        valid: Tensor | None = None,
        over: _Over = _alone,
    ) -> Tensor:
        """Computes the loss of one layer, a float32 scalar.

        Args:
            logits: float32 [B T, E].
            ids: int64 [B T, K].
            shape: (B, T).
            valid: bool [B, T], or None where nothing is padding.
            over: sums values of sequences [B, X] over the ranks that have other tokens of the same ones.
        """
        scores = router.scores(logits).unflatten(0, shape)  # [B, T, E]
        ids = ids.unflatten(0, shape)  # [B, T, K]
        mask = torch.ones(shape, dtype=torch.bool, device=logits.device) if valid is None else valid
        total = logits.new_zeros(())
        if self.sequence:
            normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            counted = scores.detach().topk(ids.shape[-1], dim=-1).indices if self.counts == "unbiased" else ids
            f, p = _load(counted, scores.shape[-1], mask, over), _mean(normalized, mask, over)
            total = total + self.sequence * _mean_over_sequences((f * p).sum(-1), mask, over)
        if self.expert or self.device or self.communication:
            f, p = _load(ids, scores.shape[-1], mask, over), _mean(scores, mask, over)
            total = total + self.expert * _mean_over_sequences((f * p).sum(-1), mask, over)
        if self.device or self.communication:
            if scores.shape[-1] % self.devices:
                raise ValueError(f"expected devices that divide {scores.shape[-1]} experts, got {self.devices}")
            on_device = p.unflatten(-1, (self.devices, -1)).sum(-1)  # P' = P'' [B, D]
            mean_load = f.unflatten(-1, (self.devices, -1)).mean(-1)
            total = total + self.device * _mean_over_sequences((mean_load * on_device).sum(-1), mask, over)
            sent = _sent(ids, scores.shape[-1], self.devices, router.topk_group, mask, over)
            total = total + self.communication * _mean_over_sequences((sent * on_device).sum(-1), mask, over)
        return total


def _tokens(mask: Tensor, over: _Over) -> Tensor:
    return over(mask.sum(-1, keepdim=True).float()).clamp(min=1)  # [B, 1]


def _mean(values: Tensor, mask: Tensor, over: _Over) -> Tensor:
    """Averages [B, T, X] over the real tokens -> [B, X]."""
    return over((values * mask[..., None]).sum(1)) / _tokens(mask, over)


@torch.no_grad()
def _load(ids: Tensor, experts: int, mask: Tensor, over: _Over) -> Tensor:
    """Computes f [B, E]: the share of a sequence's tokens that chose each expert, times E / K."""
    chosen = torch.zeros(*ids.shape[:2], experts, device=ids.device).scatter_(-1, ids.clamp(max=experts - 1), 1.0)
    return _mean(chosen, mask, over) * experts / ids.shape[-1]


@torch.no_grad()
def _sent(ids: Tensor, experts: int, devices: int, most: int, mask: Tensor, over: _Over) -> Tensor:
    """Computes f'' [B, D]: the share of a sequence's tokens that were sent to each device, times D / M."""
    to = torch.zeros(*ids.shape[:2], devices, device=ids.device).scatter_(-1, ids // (experts // devices), 1.0)
    return _mean(to, mask, over) * devices / most


def _mean_over_sequences(values: Tensor, mask: Tensor, over: _Over) -> Tensor:
    """Averages [B] over the sequences that have a real token."""
    real = over(mask.any(-1).float()) > 0
    return (values * real).sum() / real.sum().clamp(min=1)
