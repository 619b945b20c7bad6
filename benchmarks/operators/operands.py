"""Operands of operators: random tensors, float32 copies, results with their gradients."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Random", "as_tuple", "widened", "with_gradients"]


@dataclass
class Random:
    """Random tensors on a device, the same in every run for one key, such as an operator's name and shape."""

    device: torch.device
    generator: torch.Generator = field(init=False)
    key: str = ""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.key.encode()))

    def normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Returns integers of [low, high), int64."""
        return torch.randint(low, high, size, generator=self.generator, device=self.device)

    def ends(self, rows: int, experts: int, multiple: int = 16) -> Tensor:
        """Returns the end of each expert's rows, int64 [experts], for `rows` rows spread as by a router.

        Counts are multiples of `multiple` if there are enough rows, as torch's grouped products require.
        """
        step = multiple if rows >= multiple * experts else 1
        choices = self.integers(0, experts, rows // step)
        counts = torch.bincount(choices.cpu(), minlength=experts) * step
        counts[-1] += rows - counts.sum()
        return counts.cumsum(0).to(self.device)


def widened(x: Tensor) -> Tensor:
    """Returns a float32 copy outside of any graph, which requires a gradient if `x` does."""
    return x.detach().float().requires_grad_(x.requires_grad)


def with_gradients(result: Tensor, operands: Sequence[Tensor], grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns a result and the gradients of its operands; `grad` is that of the result, 1 for a scalar."""
    return result.detach(), *torch.autograd.grad(result, operands, grad)


def as_tuple(result: Any) -> tuple[Any, ...]:
    """Returns the results of an operator that has one or several."""
    return result if isinstance(result, tuple) else (result,)
