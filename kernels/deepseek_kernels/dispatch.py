"""The only place that decides which implementation of an operator runs.

`auto` (the default) takes the fastest implementation that can run here. A backend asked for by name, through the
environment variable DEEPSEEK_KERNELS_BACKEND or `use_backend`, never falls back: if it cannot run, the call raises and
says why.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "autocast",
    "describe",
    "native_half_matmul",
    "pick",
    "register",
    "use_backend",
]

BACKENDS = ("auto", "reference", "triton")
_VARIABLE = "DEEPSEEK_KERNELS_BACKEND"

# Plain module globals: Dynamo traces and guards them, which it cannot do with a ContextVar or a look at the processor.
_backend: str = os.environ.get(_VARIABLE) or "auto"
_operators: dict[str, tuple[str, ...]] = {}


class BackendError(ValueError):
    """A backend was asked for by name and does not exist or cannot run this operator."""


@dataclass(frozen=True)
class Choice:
    """What runs for one operator, and why."""

    op: str
    implementation: str
    reason: str


def register(op: str, *implementations: str) -> None:
    """Declares that operator `op` has these implementations besides its reference."""
    _operators[op] = implementations


def requested() -> str:
    """The backend in force: `use_backend`'s, else the environment variable's at import, else "auto"."""
    if _backend not in BACKENDS:
        raise BackendError(f"expected {_VARIABLE} to be one of {', '.join(BACKENDS)}, got {_backend!r}")
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator inside the block on backend `name`: "auto", "reference" or "triton"."""
    global _backend
    if name not in BACKENDS:
        raise BackendError(f"expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def pick(op: str) -> str:
    """The implementation that runs for `op`: "reference" or "triton".

    Raises:
        BackendError: a backend was asked for by name that `op` does not have.
    """
    name = requested()
    if name == "triton" and "triton" not in _operators[op]:
        raise BackendError(f"operator {op} has no triton implementation; available: reference")
    return "reference" if name == "auto" and "triton" not in _operators[op] else name


# An x86 CPU without AVX-512 has no products of 16-bit floats: torch then computes a bfloat16 product one dot product at
# a time, 5 to 6 times slower (from about 16 rows on) than expanding the operands to float32.
_NATIVE_HALF_MATMUL = not (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
)


def native_half_matmul() -> bool:
    """Whether this CPU multiplies 16-bit floats in hardware."""
    return _NATIVE_HALF_MATMUL


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product, cast as `torch.autocast` casts those of a built-in one; unchanged outside of it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t for t in tensors)


def describe() -> list[Choice]:
    """What runs for each operator on this machine, and why."""
    name, cpu = requested(), torch.backends.cpu.get_cpu_capability()
    how = (
        f"CPU {cpu}: 16-bit products in hardware"
        if native_half_matmul()
        else f"CPU {cpu} has no 16-bit products: from 16 rows on, weights are expanded to float32 block by block"
    )
    choices = []
    for op, implementations in sorted(_operators.items()):
        chosen = pick(op)
        if name != "auto":
            reason = f"{name} was asked for"
        elif not implementations:
            reason = "the reference is the only implementation"
        else:
            reason = f"available: reference, {', '.join(implementations)}"
        if op in ("dense_gemm", "grouped_gemm") and not torch.cuda.is_available():
            reason += f"; {how}"
        choices.append(Choice(op, chosen, reason))
    return choices
