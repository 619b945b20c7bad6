"""The one place that chooses implementations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deepseek_kernels import BackendError, dense_gemm, describe, dispatch, use_backend, use_native_half_matmul
from support import processor_sides


@pytest.mark.parametrize(("backend", "reason"), [("reference", "reference was asked for"), ("triton", "there is no")])
def test_an_operator_that_a_backend_does_not_implement_runs_its_reference(backend, reason):
    with use_backend(backend):
        assert dense_gemm(torch.ones(2, 4), torch.ones(3, 4)).tolist() == [[4.0] * 3] * 2
        (choice,) = (one for one in describe() if one.op == "dense_gemm")
    assert choice.implementation == "reference"
    assert choice.reason.startswith(reason)


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
    assert "expected DEEPSEEK_KERNELS_BACKEND to be one of auto, reference, triton, cpu, got 'fast'" in result.stderr


def test_describe_lists_every_operator_with_a_reason():
    choices = {choice.op: choice for choice in describe()}
    assert {"dense_gemm", "grouped_gemm", "moe_permute"} <= set(choices)
    assert all(choice.implementation == "reference" and choice.reason for choice in choices.values())


# What the processor decides.


def test_native_half_matmul_is_switched_and_restored_also_after_an_error():
    before = dispatch.native_half_matmul()
    for native in (True, False):
        with pytest.raises(RuntimeError), use_native_half_matmul(native):
            assert dispatch.native_half_matmul() is native
            raise RuntimeError
        assert dispatch.native_half_matmul() is before


def test_describe_says_which_products_16_bit_operands_take(native):
    own = dispatch._PROCESSOR_HAS_HALF_MATMUL
    choices = {choice.op: choice.reason for choice in describe()}
    for op in ("dense_gemm", "grouped_gemm", "linear_cross_entropy"):
        assert ("16-bit operands as they are" in choices[op]) is native
        assert ("expanded to float32" in choices[op]) is not native
    assert ("rounded to their dtype" in choices["fp8_weight_gemm"]) is native
    assert ("use_native_half_matmul" in choices["dense_gemm"]) is (native is not own)


def test_compiled_code_follows_the_switch(monkeypatch):
    """Dynamo guards the plain global: code compiled on one side is not used on the other, and is kept for its own."""
    torch.compiler.reset()
    monkeypatch.setattr(dispatch, "native_half_matmul", dispatch.native_half_matmul.__wrapped__)
    graphs = []

    def note(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    product = torch.compile(lambda x, weight: dense_gemm(x, weight), fullgraph=True, backend=note)
    x, weight = torch.ones(16, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    for native in (True, False, True, False):
        with use_native_half_matmul(native):
            assert product(x, weight).tolist() == [[8.0] * 4] * 16
    assert ["dense_gemm_expanded" in str(targets) for targets in graphs] == [False, True]


def test_a_test_that_asks_for_the_processor_runs_on_both_sides():
    """The tests' own machinery: `processor_sides` in tests/conftest.py."""
    x, weight = torch.ones(16, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)

    def seen(action) -> list[bool]:
        found = []
        for _ in processor_sides.sides():
            found.append(dispatch.native_half_matmul.__wrapped__())
            action()
        return found

    own = dispatch.native_half_matmul.__wrapped__()
    assert seen(lambda: dense_gemm(x, weight)) == [own, not own]
    assert seen(lambda: dense_gemm(x.float(), weight.float())) == [own]
    assert dispatch.native_half_matmul.__wrapped__() is own
    torch.compiler.reset()
    compiled = torch.compile(dense_gemm, fullgraph=True, backend="eager")
    assert seen(lambda: compiled(x, weight)) == [own, not own]
