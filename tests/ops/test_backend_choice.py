"""The implementation that runs, by machine, for an operator that has Triton kernels (`fp8_quantize`)."""

from __future__ import annotations

import logging

import pytest
import torch

import deepseek_kernels.quant.fp8_quantize  # noqa: F401  (registers the operator)
from deepseek_kernels import BackendError, dispatch, use_backend


@pytest.fixture
def pretend(monkeypatch):
    """A machine with Triton and a GPU of some capability, as far as choosing is concerned."""

    def set_up(capability=(9, 0), installed=True, interpreted=False):
        monkeypatch.setattr(dispatch, "_said", set())
        monkeypatch.setattr(dispatch, "_triton_installed", lambda: installed)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        dispatch.forget()

    yield set_up
    monkeypatch.undo()
    dispatch.forget()


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_takes_the_kernels_where_they_run(pretend):
    pretend()
    assert dispatch.pick("fp8_quantize", GPU) == "triton"
    assert dispatch.pick("fp8_quantize", CPU) == "reference"
    with use_backend("reference"):
        assert dispatch.pick("fp8_quantize", GPU) == "reference"


@pytest.mark.parametrize(
    ("machine", "device", "reason"),
    [
        ({"installed": False}, GPU, "triton is not installed"),
        ({"capability": (8, 0)}, GPU, "it needs compute capability 8.9, got 8.0"),
        ({}, CPU, "it needs a CUDA device, got cpu"),
    ],
)
def test_a_kernel_asked_for_by_name_never_falls_back(pretend, machine, device, reason):
    pretend(**machine)
    with use_backend("triton"), pytest.raises(BackendError, match=f"fp8_quantize cannot run on triton: {reason}"):
        dispatch.pick("fp8_quantize", device)


def test_auto_says_once_why_it_does_not_take_the_kernels(pretend, caplog):
    pretend(capability=(8, 0))
    with caplog.at_level(logging.INFO, logger="deepseek_kernels"):
        for device in (GPU, GPU, CPU, CPU):
            assert dispatch.pick("fp8_quantize", device) == "reference"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "fp8_quantize runs its reference: it needs compute capability 8.9, got 8.0"),
        ("INFO", "fp8_quantize runs its reference: it needs a CUDA device, got cpu"),
    ]


def test_the_interpreter_runs_only_when_asked_for(pretend):
    pretend(interpreted=True)
    assert dispatch.pick("fp8_quantize", GPU) == "reference"
    with use_backend("triton"):
        assert dispatch.pick("fp8_quantize", CPU) == "triton"


def test_describe_says_what_cannot_run(pretend):
    pretend(installed=False)
    with use_backend("triton"):
        found = {choice.op: choice for choice in dispatch.describe()}
    assert found["fp8_quantize"].implementation == "none"
    assert found["fp8_quantize"].reason == (
        "triton was asked for, but operator fp8_quantize cannot run on triton: triton is not installed"
    )
