"""Memory for the descriptors that kernels make (Triton; imported where kernels are)."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton
from torch import Tensor

__all__ = ["with_scratch"]


def with_scratch(launch: Callable[[], object]) -> None:
    """Launches a kernel that makes descriptors, without changing the allocator that others may have set."""

    def run() -> None:
        triton.set_allocator(_scratch)
        launch()

    contextvars.copy_context().run(run)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """torch's memory is aligned to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
