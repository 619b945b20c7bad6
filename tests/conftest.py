"""Start of every test: its own seed, one thread, and uninitialized memory that shows."""

from __future__ import annotations

import contextlib
import os
import random
import zlib
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch
from _pytest.runner import runtestprotocol

from deepseek_kernels import use_native_half_matmul
from support import processor_sides

# `auto` runs the same operators on every machine, whatever its user has built; tests of the C++ ask for it by name.
os.environ.setdefault("DEEPSEEK_KERNELS_CPU", "0")

with contextlib.suppress(ImportError):  # a bare GPU machine has pytest and torch only
    from hypothesis import settings

    # The same examples in every run; no deadline, because tests check and benchmarks measure.
    settings.register_profile("reproducible", derandomize=True, deadline=None)
    settings.load_profile("reproducible")

# The models are tiny: threads would only wait for each other, and sums would depend on their number.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Fills `torch.empty` with NaN, so that a value nobody wrote cannot pass for a zero. Not on a GPU, where the same
    # switch would replace the kernels under test by deterministic ones.
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_report_header() -> str:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "none"

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("torch", "transformers", "triton")
    return ", ".join([*(f"{package} {version(package)}" for package in packages), f"device {device}"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "fuzz" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if "fuzz" in item.keywords])
        items[:] = [item for item in items if "fuzz" not in item.keywords]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ---------------------------------------------------------------- what depends on the processor

processor_sides.install()


@pytest.fixture(params=[False, True], ids=["expanded", "native"])
def native(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways to multiply 16-bit floats on a CPU, for tests that have to know the one they run on."""
    with use_native_half_matmul(request.param):
        yield request.param


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs each test as pytest does, and once more on the other side if it depends on this processor."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for side in processor_sides.sides():
        item.stash[_SIDE] = side
        runtestprotocol(item, nextitem=nextitem)
        if "native" in getattr(item, "fixturenames", ()):
            break
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


_SIDE = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    report.sections.append(("processor", item.stash[_SIDE]))
    return report


# ---------------------------------------------------------------- chance


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds every generator with a hash of the test's file and name.

    A test gives the same numbers alone, in any order, and in any folder.
    """
    value = zlib.crc32(f"{request.node.path.name}::{request.node.name}".encode())
    random.seed(value)
    torch.manual_seed(value)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(value)
    return value


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds and loads the C++ operators, once for all workers of a run; skips where they cannot be built."""
    from deepseek_kernels.common import cpu

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # workers have folders of their own inside that of the run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_KERNELS_CACHE", str(shared / "cpu_library"))
        if reason := cpu.library_obstacle(auto=False):
            pytest.skip(reason)
        yield


@pytest.fixture
def cpu_backend(cpu_library) -> None:
    """For tests that run the C++ operators on the device that all tests use."""
    if torch.cuda.is_available():
        pytest.skip("the operands are on a GPU")
