"""Operators for CPUs in C++: built on the user's machine, kept in a cache, never required.

The library is built when it is asked for: by the first operator inside `use_backend("cpu")` (or with
DEEPSEEK_KERNELS_BACKEND=cpu), or ahead by `deepseek-arch build-kernels`, which also puts it into the package for a
wheel. `auto` uses a library that is in the cache or in the package and never builds one, because a compiler takes ten
to sixty seconds and the first forward pass of a program is a bad place for an unannounced stall of that length.

Two environment variables, read once: with DEEPSEEK_KERNELS_CPU=0, `auto` leaves the library alone, and
DEEPSEEK_KERNELS_CACHE names the folder of the cache (by default `deepseek_kernels` in XDG_CACHE_HOME or in ~/.cache).
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..autograd import transformed
from .building import PACKAGED, BuildError, build, find, packaged_misfit

__all__ = [
    "FEW_ROWS",
    "BuildError",
    "build_library",
    "cache_folder",
    "library_obstacle",
    "multiplies_many",
    "needs_gradient",
    "observed",
]

FEW_ROWS = 8  # of activations: what a product reads its weight once for

_OFF, _CACHE = "DEEPSEEK_KERNELS_CPU", "DEEPSEEK_KERNELS_CACHE"
_TENSORS = (Tensor, nn.Parameter)
_NOT_BUILT = "its library is not built, which `deepseek-arch build-kernels` does once for all"

when_built: list[Callable[[], None]] = []
"""Called once a library is built or loaded; `dispatch` forgets its choices then."""

_loaded = False
_obstacles: dict[bool, str | None] = {}  # under `auto` and by name: neither is tried twice


def cache_folder() -> Path:
    """Returns the folder that holds built libraries, which need not exist."""
    if chosen := os.environ.get(_CACHE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deepseek_kernels"


def library_obstacle(auto: bool) -> str | None:
    """Loads the library, and returns why it cannot run here, or None if it can.

    Args:
        auto: it was not asked for by name: only a library that is built is loaded, and only if it is not turned off.
    """
    if auto and _turned_off():
        return f"{_OFF} is 0"
    if _loaded:
        return None
    if auto not in _obstacles:
        _obstacles[auto] = _load(may_build=not auto)
    return _obstacles[auto] if not _loaded else None


@functools.cache
def _turned_off() -> bool:
    return os.environ.get(_OFF) == "0"


def needs_gradient(*tensors: Tensor) -> bool:
    """Returns True if autograd would record an operator on these, of which the library has none, or is `observed`."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return observed(*tensors)


def observed(*tensors: Tensor) -> bool:
    """Returns True if something has rules of its own for PyTorch's operators, of which it knows none for the library's.

    These are subclasses of tensors (distributed ones), forward-mode AD, which drops tangents in silence, and the
    transforms of `torch.func`.
    """
    for tensor in tensors:
        if type(tensor) not in _TENSORS:
            return True
    return transformed()


def multiplies_many(activations: torch.dtype, weight: torch.dtype) -> bool:
    """Returns True if more than `FEW_ROWS` rows of these dtypes are multiplied as fast as by the built-in product."""
    if activations == weight == torch.bfloat16:
        return _native_bfloat16()
    return activations == weight == torch.float32


def _native_bfloat16() -> bool:
    return torch.ops.deepseek_kernels_cpu.native_bfloat16()


_native_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it looks at the processor


def build_library(into_package: bool = False) -> Path:
    """Builds the library unless there is one that fits, and returns its path.

    Args:
        into_package: builds it into this package's folder instead of the cache, for wheels: it is found there on
            machines without a compiler, with the same PyTorch, Python and kind of CPU.

    Raises:
        BuildError: this platform has none, there is no compiler, or it failed.
    """
    if reason := _platform_obstacle():
        raise BuildError(reason)
    try:
        library = build(PACKAGED) if into_package else find(cache_folder()) or build(cache_folder())
    except (OSError, RuntimeError, ValueError) as error:  # no home directory, or settings that are no command
        raise BuildError(str(error)) from error
    _forget_choices()
    return library


def _forget_choices() -> None:
    """Lets operators choose again: what they found before there was a library is no longer so."""
    _obstacles.clear()
    for listener in when_built:
        listener()


def _load(may_build: bool) -> str | None:
    global _loaded
    if reason := _platform_obstacle():
        return reason
    try:
        library = find(cache_folder()) or (build(cache_folder()) if may_build else None)
    except (BuildError, OSError, RuntimeError, ValueError) as error:  # a library is never required
        return str(error)
    if library is None:
        misfit = packaged_misfit()
        return f"{_NOT_BUILT}; {misfit}" if misfit else _NOT_BUILT
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"its library {library} cannot be loaded: {error}"
    from . import fakes

    fakes.register()
    _loaded = True
    _forget_choices()
    return None


def _platform_obstacle() -> str | None:
    if platform.system() != "Linux":
        return f"its library is for Linux, got {platform.system()}"
    machine, capability = platform.machine().lower(), torch.backends.cpu.get_cpu_capability()
    if machine in ("x86_64", "amd64") and capability in ("AVX2", "AVX512"):
        return None
    if machine in ("aarch64", "arm64"):
        return None
    return f"its library needs a CPU with AVX2, AVX-512 or NEON, got {machine} with {capability}"
