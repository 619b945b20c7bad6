"""Operators are tested on the GPU where there is one, and elsewhere with Triton's corrected interpreter on the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel's module is imported, so it has to be here, above all test modules of this folder.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from deepseek_kernels import use_backend
from deepseek_kernels.testing.interpreter import corrected_interpreter, interprets


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels that run on the CPU compute bfloat16 and FP8 as a GPU does."""
    if not interprets() or find_spec("triton") is None:
        yield
        return
    with corrected_interpreter():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend() -> None:
    """For tests that run kernels: skips where neither a GPU nor the interpreter can."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not torch.cuda.is_available() and not interprets():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Either implementation of an operator, asked for by name."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["few", "many"])
def quantization_tile(request: pytest.FixtureRequest, triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either tile of the kernels that quantize along the rows, whatever the size."""
    from deepseek_kernels.quant.fp8_quantize import configs

    monkeypatch.setattr(configs, "ENOUGH_PROGRAMS", 0 if request.param == "many" else math.inf)
