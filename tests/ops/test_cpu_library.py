"""The C++ operators' library: when it is built, where it is kept, and why it does not run.

All but the last tests build with a compiler that writes down that it was called, and takes no time.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepseek_kernels import BackendError, dispatch, rms_norm, use_backend
from deepseek_kernels.common import cpu
from deepseek_kernels.common.cpu import BuildError, building

linux = pytest.mark.skipif(platform.system() != "Linux", reason="the library is for Linux")

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "compiler {version}"; exit; fi
echo "$@" >> {log}
sleep {seconds}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo "made by {version}" > "$2"; fi; shift; done
{end}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes CXX a script; its log has two lines for each library, of compiling and linking."""

    def make(version: str = "1", seconds: float = 0, end: str = "") -> Path:
        script, log = tmp_path / f"c++-{version}", tmp_path / "log"
        script.write_text(COMPILER.format(version=version, log=log, seconds=seconds, end=end))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
        building._identity.cache_clear()
        return log

    yield make
    building._identity.cache_clear()


@pytest.fixture
def unloaded(tmp_path, monkeypatch) -> Iterator[None]:
    """A process that has loaded no library, with an empty cache."""
    monkeypatch.setattr(cpu, "_loaded", False)
    monkeypatch.setattr(cpu, "_obstacles", {})
    monkeypatch.setattr(cpu, "_turned_off", lambda: False)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setenv("DEEPSEEK_KERNELS_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    yield
    monkeypatch.undo()
    dispatch.forget()


def calls(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != "lock")


# Building and finding.


def test_a_library_is_built_once_and_found_again(compiler, tmp_path):
    log = compiler()
    assert building.find(tmp_path / "cache") is None
    library = building.build(tmp_path / "cache")
    assert calls(log) == 2 and library.read_bytes().startswith(b"made by 1\n")
    assert building.find(tmp_path / "cache") == building.build(tmp_path / "cache") == library
    assert calls(log) == 2 and files(tmp_path / "cache") == [library.name]


@pytest.mark.parametrize("broken", ["cut off", "changed", "empty", "missing"])
def test_a_broken_library_is_built_again(compiler, tmp_path, broken):
    log = compiler()
    library = building.build(tmp_path)
    whole = library.read_bytes()
    changed = {"cut off": whole[:-1], "changed": b"M" + whole[1:], "empty": b""}
    if broken == "missing":
        library.unlink()
    else:
        library.write_bytes(changed[broken])
    assert building.find(tmp_path) is None
    assert building.build(tmp_path).read_bytes() == whole
    assert calls(log) == 4


def _build_in_a_process(cache: Path, barrier) -> None:
    barrier.wait()
    building.build(cache)


@linux
def test_processes_that_start_at_once_build_one_library(compiler, tmp_path):
    log = compiler(seconds=0.5)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_build_in_a_process, args=(tmp_path / "cache", barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert calls(log) == 2 and len(files(tmp_path / "cache")) == 1


def test_what_a_library_depends_on_names_it(compiler, tmp_path, monkeypatch):
    compiler("1")
    names = {building.build(tmp_path)}
    compiler("2")
    names.add(building.build(tmp_path))
    monkeypatch.setattr(building, "_torch_version", lambda: ("99.0", "0"))
    names.add(building.build(tmp_path))
    monkeypatch.setattr(building, "_capability", lambda: "DEFAULT")
    names.add(building.build(tmp_path))
    other = tmp_path / "other.h"
    other.write_text("// changed")
    monkeypatch.setattr(building, "_sources", lambda: (other,))
    names.add(building.build(tmp_path))
    assert len(names) == 5


def test_without_a_compiler_a_library_that_is_there_is_used(compiler, tmp_path, monkeypatch):
    compiler()
    library = building.build(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert building.find(tmp_path) == library
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found .* install g\+\+, or name one in CXX"):
        building.build(tmp_path)


def test_a_library_that_came_with_the_package(compiler, unloaded, tmp_path, monkeypatch):
    """It is found behind the cache, without a compiler, and only by the PyTorch and the CPU that it was built for."""
    log = compiler()
    monkeypatch.setattr(building, "PACKAGED", tmp_path / "package")
    monkeypatch.setattr(cpu, "PACKAGED", tmp_path / "package")
    assert building.packaged_misfit() is None
    library = cpu.build_library(into_package=True)
    assert library.is_relative_to(tmp_path / "package") and not cpu.cache_folder().exists()
    assert cpu.build_library() == library and calls(log) == 2
    own = building.build(cpu.cache_folder())
    assert cpu.build_library() == own and calls(log) == 4
    own.unlink()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert building.find(cpu.cache_folder()) == library and building.packaged_misfit() is None
    monkeypatch.setattr(building, "_torch_version", lambda: ("99.0", "0"))
    assert building.find(cpu.cache_folder()) is None
    expected = rf"another PyTorch, Python, CPU or OpenMP \(found {library.parent.name}, expected "
    assert re.search(expected, building.packaged_misfit() or "")
    if platform.system() == "Linux":
        assert re.search(f"its library is not built.*; .*{expected}", cpu.library_obstacle(auto=True) or "")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(compiler, tmp_path):
    compiler(end="echo 'kernels.cpp: error: no such thing' >&2; exit 1")
    with pytest.raises(BuildError, match=r"failed to build its library:\nkernels\.cpp: error: no such thing"):
        building.build(tmp_path / "cache")
    assert files(tmp_path / "cache") == [] and building.find(tmp_path / "cache") is None


def test_a_folder_that_cannot_be_written_is_named(compiler, tmp_path):
    compiler()
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BuildError, match=f"could not be written to {re.escape(str(tmp_path / 'cache'))}"):
        building.build(tmp_path / "cache")


# Choosing.


@linux
def test_auto_never_builds(compiler, unloaded, tmp_path, caplog):
    log = compiler()
    x, weight = torch.randn(2, 8), torch.ones(8)
    with use_backend("auto"), caplog.at_level("INFO", logger="deepseek_kernels"):
        rms_norm(x, weight, 1e-6)
        choices = {choice.op: choice for choice in dispatch.describe()}
    assert calls(log) == 0 and not (tmp_path / "cache").exists()
    if torch.cuda.is_available():
        return
    reason = "its library is not built, which `deepseek-arch build-kernels` does once for all"
    assert f"rms_norm runs its reference: {reason}" in caplog.text
    assert choices["rms_norm"].implementation == choices["dense_gemm"].implementation == "reference"
    assert reason in choices["rms_norm"].reason


@linux
def test_asked_for_by_name_it_is_built_or_says_why(compiler, unloaded):
    log = compiler(end="echo 'a compiler that fails' >&2; exit 1")
    with use_backend("cpu"):
        for _ in range(2):  # a failure is not tried again
            with pytest.raises(BackendError, match=r"rms_norm cannot run on cpu: (.|\n)*a compiler that fails"):
                rms_norm(torch.randn(2, 8), torch.ones(8), 1e-6)
        (choice,) = (one for one in dispatch.describe() if one.op == "rms_norm")
    if not torch.cuda.is_available():
        assert choice.implementation == "none" and "a compiler that fails" in choice.reason
    assert calls(log) == 1


@linux
def test_a_library_that_cannot_be_loaded_says_so(compiler, unloaded):
    compiler()
    with use_backend("cpu"), pytest.raises(BackendError, match=r"its library .* cannot be loaded"):
        rms_norm(torch.randn(2, 8), torch.ones(8), 1e-6)


def test_other_platforms_say_why(unloaded, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert cpu.library_obstacle(auto=True) == "its library is for Linux, got Darwin"
    with pytest.raises(BuildError, match="its library is for Linux, got Darwin"):
        cpu.build_library()


def test_an_old_processor_says_why(unloaded, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    expected = "its library needs a CPU with AVX2, AVX-512 or NEON, got x86_64 with DEFAULT"
    assert cpu.library_obstacle(auto=False) == expected


def test_it_runs_on_no_other_device():
    with use_backend("cpu"), pytest.raises(BackendError, match="rms_norm cannot run on cpu: it needs a CPU, got meta"):
        rms_norm(torch.empty(2, 8, device="meta"), torch.empty(8, device="meta"), 1e-6)


def test_the_variable_turns_it_off_for_auto(unloaded, monkeypatch):
    monkeypatch.setattr(cpu, "_turned_off", lambda: True)
    monkeypatch.setattr(cpu, "_loaded", True)
    assert cpu.library_obstacle(auto=True) == "DEEPSEEK_KERNELS_CPU is 0"
    assert cpu.library_obstacle(auto=False) is None


# The real library.


def in_a_new_process(code: str, **variables: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_auto_uses_a_library_that_is_there(cpu_backend):
    code = """
import torch
from deepseek_kernels import describe, rms_norm
assert not hasattr(torch.ops.deepseek_kernels_cpu, "rms_norm"), "loaded by an import"
rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6)
print(*(choice.implementation for choice in describe() if choice.op in ("dense_gemm", "grouped_gemm", "rms_norm")))
"""
    assert in_a_new_process(code, DEEPSEEK_KERNELS_CPU="1") == ["cpu", "reference", "cpu"]
    assert in_a_new_process(code, DEEPSEEK_KERNELS_CPU="0") == ["reference"] * 3


@linux
def test_threads_are_those_of_torch(cpu_backend):
    """With a second OpenMP runtime in the process, two pools of threads would take turns on the same cores."""
    code = """
import re, torch
from deepseek_kernels.common import cpu
assert cpu.library_obstacle(auto=False) is None
maps = open("/proc/self/maps").read()
print(*{path for path in re.findall(r"/[^ ]*$", maps, re.MULTILINE) if re.search(r"lib(gomp|iomp5|omp)[-.]", path)})
"""
    assert len(in_a_new_process(code)) == 1


@pytest.mark.parametrize("broken", ["home", "compiler"])
def test_what_is_wrong_with_the_surroundings_is_a_reason(monkeypatch, broken):
    """Without a home directory, or with settings that are no command, operators run their references."""

    def fail(*args):
        raise (
            RuntimeError("Could not determine home directory.")
            if broken == "home"
            else ValueError("No closing quotation")
        )

    monkeypatch.setattr(cpu, "cache_folder" if broken == "home" else "find", fail)
    assert cpu._load(may_build=False) in ("Could not determine home directory.", "No closing quotation")
    with pytest.raises(cpu.BuildError):
        cpu.build_library()
