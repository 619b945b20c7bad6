"""Builds the C++ operators and keeps them: one compiler call, one file, safe for processes that start at once.

A library is named by everything that it depends on: the sources, torch, Python, the vector instructions, the flags, the
OpenMP runtime, and the compiler. It is written beside its place and renamed, under a lock, and ends with its own
checksum: a file that a full disk has cut off, say, is never mapped into a process, and is built again.

The compiler is called directly: `torch.utils.cpp_extension` needs setuptools and Ninja, neither of which torch
installs, and links an OpenMP runtime of its own choice beside the one that torch has started threads in.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["PACKAGED", "BuildError", "build", "find", "packaged_misfit"]

PACKAGED = Path(__file__).parent / "lib"
"""Libraries that came with the package, in a wheel: laid out as a cache, and looked into after it."""

_SOURCES = Path(__file__).parent / "csrc"
_TORCH = Path(torch.__file__).parent
_CHECKSUM = 32  # bytes of SHA-256 behind the library
_LINES = 15  # of a compiler's complaint

# Products and sums are rounded one by one, as PyTorch's are; what is fused says so (`fmadd`).
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-w")
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


class BuildError(RuntimeError):
    """The C++ operators cannot be built here."""


def find(cache: Path) -> Path | None:
    """Returns a library that is whole and fits: this compiler's in the cache, else one that came with the package.

    Without a compiler, any in the cache. What does not fit lies in a folder of another name, which is not looked into.
    """
    compiler = _compiler()
    places = [_place(cache, compiler)] if compiler is not None else _libraries(cache)
    return next((library for library in (*places, *_libraries(PACKAGED)) if _whole(library)), None)


def packaged_misfit() -> str | None:
    """Returns what is wrong with the libraries that came with the package, or None if there are none or one fits."""
    if not PACKAGED.is_dir() or any(_whole(library) for library in _libraries(PACKAGED)):
        return None
    found = ", ".join(sorted(folder.name for folder in PACKAGED.iterdir() if folder.is_dir()))
    return (
        f"the library that came with the package is of another PyTorch, Python, CPU or OpenMP "
        f"(found {found or 'none'}, expected {_folder(PACKAGED).name})"
    )


def _libraries(cache: Path) -> list[Path]:
    return sorted(_folder(cache).glob("kernels-*.so"))


def build(cache: Path) -> Path:
    """Builds the library, unless another process has just done so, and returns its path.

    Raises:
        BuildError: no compiler, or a compiler, a disk or a folder that fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found to build its library: install g++, or name one in CXX")
    library = _place(cache, compiler)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _locked(library.parent / "lock"):
            if not _whole(library):
                _build(compiler, library)
    except OSError as error:
        raise BuildError(f"its library could not be written to {cache}: {error}") from error
    return library


def _build(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unity, compiled, linked = (Path(folder) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
        # One unit, because torch's headers take longer to read than all of the operators to compile.
        unity.write_text("".join(f'#include "{path.name}"\n' for path in _sources() if path.suffix == ".cpp"))
        includes = ("-I", str(_SOURCES), "-I", str(_TORCH / "include"))
        _run([*compiler, *_flags(), *includes, "-c", str(unity), "-o", str(compiled)])
        libraries = ("-L", str(_TORCH / "lib"), "-ltorch_cpu", "-lc10", _openmp() or "-fopenmp")
        _run([*compiler, "-shared", str(compiled), "-o", str(linked), *libraries])
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())
        linked.replace(library)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()[:_LINES]
        raise BuildError(f"{shlex.join(command)} failed to build its library:\n" + "\n".join(lines))


def _whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_CHECKSUM]).digest() == content[-_CHECKSUM:]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes; the system frees the lock of one that has died."""
    import fcntl

    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------ what a library depends on


def _place(cache: Path, compiler: list[str]) -> Path:
    return _folder(cache) / f"kernels-{_identity(tuple(compiler))}.so"


def _folder(cache: Path) -> Path:
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in _sources()]
    parts += [repr((_torch_version(), sys.implementation.cache_tag, platform.machine())).encode()]
    parts += [repr((*_flags(), Path(_openmp() or "").name)).encode()]
    return cache / f"{_capability().lower()}-{_digest(*parts)}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


@functools.cache
def _sources() -> tuple[Path, ...]:
    return tuple(sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h")))


def _torch_version() -> tuple[str, str | None]:
    return torch.__version__, torch.version.git_version


def _capability() -> str:
    """The vector instructions that torch itself has found, or was told to use: DEFAULT on Arm, where NEON is."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in _VECTORS else "DEFAULT"


def _flags() -> tuple[str, ...]:
    name = _capability()
    return (*_FLAGS, *_VECTORS.get(name, ()), f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}")


def _compiler() -> list[str] | None:
    """The command in CXX, or the first that there is."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


@functools.cache
def _identity(compiler: tuple[str, ...]) -> str:
    """A digest of the compiler's command and version."""
    result = subprocess.run([*compiler, "--version"], capture_output=True, check=False)
    return _digest(shlex.join(compiler).encode(), result.stdout)


@functools.cache
def _openmp() -> str | None:
    """The OpenMP runtime in which torch runs its threads: another one beside it would have threads of its own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[-.][^/\s]*)$", maps, re.MULTILINE)))
    own = [path for path in found if Path(path).is_relative_to(_TORCH.parent)]
    return next(iter([*own, *found]), None)
