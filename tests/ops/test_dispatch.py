"""The one place that chooses implementations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deepseek_kernels import BackendError, dense_gemm, describe, dispatch, use_backend


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_an_operator_with_one_implementation_has_no_choice(backend):
    with use_backend(backend):
        assert dense_gemm(torch.ones(2, 4), torch.ones(3, 4)).tolist() == [[4.0] * 3] * 2
        (choice,) = (one for one in describe() if one.op == "dense_gemm")
    assert choice.implementation == "reference"
    assert choice.reason.startswith("the reference is the only implementation")


def test_use_backend_restores_also_after_an_error():
    before = dispatch.requested()
    with pytest.raises(RuntimeError), use_backend("reference"):
        assert dispatch.requested() == "reference"
        raise RuntimeError
    assert dispatch.requested() == before


def test_unknown_backend_is_named():
    with pytest.raises(BackendError, match="cuda"), use_backend("cuda"):
        pass


def test_environment_variable_is_read_and_checked():
    code = "import torch, deepseek_kernels as k; k.dense_gemm(torch.ones(2, 4), torch.ones(3, 4))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DEEPSEEK_KERNELS_BACKEND": "fast"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "expected DEEPSEEK_KERNELS_BACKEND to be one of auto, reference, triton, got 'fast'" in result.stderr


def test_describe_lists_every_operator_with_a_reason():
    choices = {choice.op: choice for choice in describe()}
    assert {"dense_gemm", "grouped_gemm", "moe_permute"} <= set(choices)
    assert all(choice.implementation == "reference" and choice.reason for choice in choices.values())
