"""Runs a test again where the processor decided what it computed: with 16-bit floats multiplied the other way.

A green run on a machine with 16-bit products would otherwise hide a red one on a machine without, and the reverse.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

from deepseek_kernels import dispatch

_native_half_matmul = dispatch.native_half_matmul
_asked = False


@functools.wraps(_native_half_matmul)
def _asking() -> bool:
    """Notes that the answer was needed. Only written, so Dynamo traces it without guarding on the note."""
    global _asked
    _asked = True
    return _native_half_matmul()


def install() -> None:
    """Has every question noted from now on; `dispatch.native_half_matmul.__wrapped__` is the original."""
    dispatch.native_half_matmul = _asking


def sides() -> Iterator[str]:
    """Names this machine's side, then, if the test that ran meanwhile asked for it, the other; each in force until the
    next is asked for."""
    global _asked
    _asked = False
    yield _name(_native_half_matmul())
    if _asked:
        _forget_compiled()
        with dispatch.use_native_half_matmul(not _native_half_matmul()):
            yield _name(_native_half_matmul())
        _forget_compiled()


def _name(native: bool) -> str:
    return f"16-bit floats on a CPU: {'multiplied as they are' if native else 'expanded to float32'}"


def _forget_compiled() -> None:
    """Drops code compiled on the other side, which guards would only hide as a recompilation too many."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
