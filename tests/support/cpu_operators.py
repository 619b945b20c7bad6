"""The C++ operators on both kinds of instructions, and on two threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from deepseek_kernels import use_backend

__all__ = ["cpu_instructions", "on_two_threads"]

T = TypeVar("T")


@contextmanager
def cpu_instructions(kind: str) -> Iterator[None]:
    """Runs the C++ operators with "native" 16-bit products (AVX512-BF16; skips where there are none) or "portable"."""
    library = torch.ops.deepseek_kernels_cpu
    before = library.native_bfloat16()
    library.set_native_bfloat16(kind == "native")
    try:
        if kind == "native" and not library.native_bfloat16():
            pytest.skip("the CPU has no AVX512-BF16")
        with use_backend("cpu"):
            yield
    finally:
        library.set_native_bfloat16(before)


def on_two_threads(action: Callable[[], T]) -> T:
    """Returns what an action returns when it has two threads; all other tests have one."""
    torch.set_num_threads(2)
    try:
        return action()
    finally:
        torch.set_num_threads(1)
