"""Runs a test twice if its result depends on the processor: with native 16-bit products, and without.

Otherwise a test that passes on one kind of machine could fail unnoticed on the other.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch

from deepseek_kernels import dispatch

_native_half_matmul = dispatch.native_half_matmul
_asked: torch.dtype | None = None


@functools.wraps(_native_half_matmul)
def _asking(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Records the dtype that a test asked for. The record is only written here, so that Dynamo traces it without a
    guard."""
    global _asked
    _asked = dtype
    return _native_half_matmul(dtype)


def install() -> None:
    """Records every call from now on; `dispatch.native_half_matmul.__wrapped__` is the original."""
    dispatch.native_half_matmul = _asking


def sides() -> Iterator[str]:
    """Yields the name of this machine's side, then, if the test that ran meanwhile asked, that of the other side.

    Each is in force until the next one is requested.
    """
    global _asked
    _asked = None
    yield _name(_native_half_matmul())
    if (asked := _asked) is not None:
        _forget_compiled()
        with dispatch.use_native_half_matmul(not _native_half_matmul(asked)):
            yield _name(_native_half_matmul(asked))
        _forget_compiled()


def _name(native: bool) -> str:
    return f"16-bit floats on a CPU: {'multiplied as they are' if native else 'expanded to float32'}"


def _forget_compiled() -> None:
    """Drops code compiled on the other side, which would count as a recompilation."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
