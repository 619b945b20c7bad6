"""The only place that decides which implementation of an operator runs.

`auto` (the default) takes the Triton kernels on a CUDA device that can run them, the C++ operators on a CPU if their
library is built (see `common.cpu`), and the reference elsewhere, and says why once, through the logger
`deepseek_kernels`. A backend asked for by name, through the environment variable DEEPSEEK_KERNELS_BACKEND or
`use_backend`, never falls back: if it cannot run, the call raises and says why. Operators that a backend does not
implement have no choice to make and run their reference.

A reference takes one of two paths with floats of a 16-bit dtype on a CPU, as the processor multiplies them or not:
`native_half_matmul` decides, `use_native_half_matmul` overrides it, and `describe` says which applies.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from .common import cpu, float32_products

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
    "use_native_half_matmul",
]

BACKENDS = ("auto", "reference", "triton", "cpu")
_VARIABLE = "DEEPSEEK_KERNELS_BACKEND"
_CPU_RUNS = "its C++ runs on this CPU; what it is not made for, the reference does"
_logger = logging.getLogger("deepseek_kernels")


class BackendError(ValueError):
    """A backend was asked for by name and does not exist or cannot run this operator."""


@dataclass(frozen=True)
class Choice:
    """Implementation that runs for one operator, and the reason."""

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class _Operator:
    implementations: tuple[str, ...]
    capability: tuple[int, int]
    settled: dict[tuple[str, int | None, str], str] = field(default_factory=dict)
    """By kind and number of a device and backend in force, the implementation that this machine runs, operands
    permitting: looked up once, see `forget`."""


# Plain module globals: Dynamo traces and guards them, which it cannot do with a ContextVar or a look at the processor.
_backend: str = os.environ.get(_VARIABLE) or "auto"
_operators: dict[str, _Operator] = {}
_said: set[tuple[str, str]] = set()


def register(op: str, *implementations: str, capability: tuple[int, int] = (8, 0)) -> None:
    """Declares that operator `op` has these implementations besides its reference.

    Args:
        capability: the least CUDA compute capability of its Triton kernels, (8, 9) where they convert to FP8.
    """
    _operators[op] = _Operator(implementations, capability)


def requested() -> str:
    """The backend in force: `use_backend`'s, else the environment variable's at import, else "auto"."""
    if _backend not in BACKENDS:
        raise BackendError(f"expected {_VARIABLE} to be one of {', '.join(BACKENDS)}, got {_backend!r}")
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator inside the block on backend `name`, one of `BACKENDS`."""
    global _backend
    if name not in BACKENDS:
        raise BackendError(f"expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def pick(op: str, device: torch.device | None = None, unsupported: str | None = None) -> str:
    """The implementation that runs for `op`: "reference", "triton" or "cpu".

    Args:
        device: where the operands are; None for an operator that has nothing but its reference.
        unsupported: why the Triton kernels cannot take these very operands, if they cannot. Callers of the C++ leave
            what it is not made for (many rows, gradients) to the reference, also where it was asked for by name.

    Raises:
        BackendError: an implementation was asked for by name and cannot run.
    """
    kind, index = ("cpu", None) if device is None else (device.type, device.index)
    chosen = _settled(op, kind, index, _backend)
    if chosen == "cpu" and torch.compiler.is_exporting():
        return "reference"  # a program is to run where there is no library, and for sizes that no branch has looked at
    return chosen if unsupported is None or chosen == "reference" else _choose(op, kind, index, unsupported)


def _settled(op: str, kind: str, index: int | None, backend: str) -> str:
    """Returns the implementation of `op` that this machine runs, operands permitting."""
    settled, key = _operators[op].settled, (kind, index, backend)
    if key not in settled:
        settled[key] = _choose(op, kind, index, None)
    return settled[key]


def _choose(op: str, kind: str, index: int | None, unsupported: str | None) -> str:
    name = requested()
    chosen = _candidate(_operators[op], name, kind)
    if chosen == "reference":
        return chosen
    obstacle = _obstacle(op, chosen, kind, index, unsupported, name == "auto")
    if obstacle is None:
        return chosen
    if name != "auto":
        raise BackendError(obstacle)
    return "reference"


def _candidate(operator: _Operator, name: str, kind: str) -> str:
    """The implementation that backend `name` would run on a device of this kind, if nothing is in its way."""
    if name == "auto":
        name = "cpu" if kind == "cpu" and "cpu" in operator.implementations else "triton"
    return name if name in operator.implementations else "reference"


def _obstacle(op: str, chosen: str, kind: str, index: int | None, unsupported: str | None, auto: bool) -> str | None:
    """Returns why implementation `chosen` of `op` does not run on such a device, or None; `auto` logs it once."""
    if chosen == "cpu":
        reason = _cpu_obstacle(kind, auto)
    else:
        reason = _triton_obstacle(_operators[op], kind, index, auto) or unsupported
    if reason is None:
        return None
    if auto and (op, reason) not in _said:
        _said.add((op, reason))
        # On a GPU the reference is a surprise, and slow; elsewhere it is what one expects.
        _logger.log(logging.WARNING if kind == "cuda" else logging.INFO, "%s runs its reference: %s", op, reason)
    return f"operator {op} cannot run on {chosen}: {reason}"


# Dynamo calls these while tracing and keeps the answers: they look at the machine, which cannot be traced, and at what
# was settled before, which is not to be guarded. This is what `torch.compiler.assume_constant_result` sets; calling
# that would import the compiler, and Triton, with this module.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_settled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cpu_obstacle(kind: str, auto: bool) -> str | None:
    return cpu.library_obstacle(auto) if kind == "cpu" else f"it needs a CPU, got {kind}"


def _triton_obstacle(operator: _Operator, kind: str, index: int | None, auto: bool) -> str | None:
    if not _triton_installed():
        return "triton is not installed"
    if _interprets():  # kernels then run in Python, on any device, very slowly
        return "TRITON_INTERPRET is set, and the interpreter runs only when asked for by name" if auto else None
    if kind != "cuda":
        return f"it needs a CUDA device, got {kind}"
    found = torch.cuda.get_device_capability(index)
    if found < operator.capability:
        least = ".".join(map(str, operator.capability))
        return f"it needs compute capability {least}, got {found[0]}.{found[1]}"
    return None


def forget() -> None:
    """Has the machine looked at again, for tests that pretend to run on another one."""
    _interprets.cache_clear()
    for operator in _operators.values():
        operator.settled.clear()


cpu.when_built.append(forget)


@functools.cache
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


# An x86 CPU without AVX-512 has no products of 16-bit floats: torch then computes a bfloat16 product one dot product at
# a time, 5 to 6 times slower (from about 16 rows on) than expanding the operands to float32. Those of float16 need
# instructions (AVX512-FP16, AMX-FP16) that most CPUs with AVX-512 lack, where they are 4 times slower than float32.
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_PROCESSOR_HAS_HALF_MATMUL = not (_X86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"))


def _processor_has_float16_matmul() -> bool:
    if not _X86:
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


# Plain globals, as `_backend`.
_native_bfloat16: bool = _PROCESSOR_HAS_HALF_MATMUL
_native_float16: bool = _PROCESSOR_HAS_HALF_MATMUL and _processor_has_float16_matmul()


def native_half_matmul(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Tells if operands of this 16-bit dtype are multiplied as they are on a CPU: `use_native_half_matmul`'s, else as
    the processor has such products or not."""
    return _native_float16 if dtype == torch.float16 else _native_bfloat16


@contextmanager
def use_native_half_matmul(native: bool) -> Iterator[None]:
    """Multiplies 16-bit floats on a CPU as they are (True) or expanded to float32 (False) inside the block.

    Every processor computes both, one of them slowly: this shows on one machine what another computes. A backward pass
    follows what is in force when it runs. Operands in float32 and on other devices are not concerned.
    """
    global _native_bfloat16, _native_float16
    previous = _native_bfloat16, _native_float16
    _native_bfloat16 = _native_float16 = native
    try:
        yield
    finally:
        _native_bfloat16, _native_float16 = previous


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product, cast as `torch.autocast` casts those of a built-in one; unchanged outside of it."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t for t in tensors)


def describe() -> list[Choice]:
    """Returns the implementation of each operator on this machine, and why; "none" if one named cannot run."""
    name = requested()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = []
    for op, operator in sorted(_operators.items()):
        chosen, reason = _described(op, operator, name, device)
        if op in _HALF_PRODUCTS and device.type != "cuda":
            reason += f"; {_half_products(op)}"
        choices.append(Choice(op, chosen, reason))
    return choices


def _described(op: str, operator: _Operator, name: str, device: torch.device) -> tuple[str, str]:
    chosen = _candidate(operator, name, device.type)
    if not operator.implementations:
        return chosen, "the reference is the only implementation"
    asked = f"{name} was asked for"
    if chosen == "reference":
        return chosen, asked if name in ("auto", "reference") else f"there is no implementation for {name}"
    obstacle = _obstacle(op, chosen, device.type, device.index, None, name == "auto")
    if name != "auto":
        return ("none", f"{asked}, but {obstacle}") if obstacle else (chosen, asked)
    if obstacle:
        return "reference", obstacle
    return chosen, _CPU_RUNS if chosen == "cpu" else f"its kernels run on {torch.cuda.get_device_name(device)}"


# By operator, what becomes of 16-bit operands on a CPU (expanded, native).
_HALF_PRODUCTS = {
    "dense_gemm": ("from 16 rows on, weights are expanded to float32 block by block", "16-bit operands as they are"),
    "grouped_gemm": ("from 16 rows on, weights are expanded to float32 block by block", "16-bit operands as they are"),
    "linear_cross_entropy": (
        "from 16 rows on, weights are expanded to float32 block by block",
        "16-bit operands as they are",
    ),
    "fp8_weight_gemm": (
        "tiles of the weight are float32",
        "from 32 rows of 16-bit activations on, tiles of the weight are rounded to their dtype",
    ),
}


def _half_products(op: str) -> str:
    native, instructions = native_half_matmul(), torch.backends.cpu.get_cpu_capability()
    how = f"CPU {instructions} has {'16-bit' if _PROCESSOR_HAS_HALF_MATMUL else 'no 16-bit'} products"
    if native != _PROCESSOR_HAS_HALF_MATMUL:
        how += f", use_native_half_matmul({native}) is in force"
    how += f": {_HALF_PRODUCTS[op][native]}"
    if native and not native_half_matmul(torch.float16):
        how += f"; it has none of float16: {_HALF_PRODUCTS[op][False]}"
    return how + ("; large products of float32 by oneDNN" if float32_products.prefers_onednn() else "")
