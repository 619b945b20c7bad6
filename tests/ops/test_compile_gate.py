"""Every kernel, in every configuration, compiles cleanly for all targets; and the gate sees what is not clean."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402  (skips above where there is no triton)

from deepseek_kernels.testing.compile_gate import (  # noqa: E402
    CompileCase,
    Record,
    assert_clean,
    compile_case,
    compile_in_subprocess,
    operators,
)
from deepseek_kernels.testing.interpreter import interprets  # noqa: E402


def test_operators_with_kernels_are_found():
    assert {"fp8_gemm", "mla_attention", "rms_norm"} <= set(operators())


@pytest.mark.parametrize("name", operators())
def test_every_kernel_is_clean(name):
    records = compile_in_subprocess([name])
    assert {record.op for record in records} == {name}
    assert {record.target for record in records} >= {"sm_90", "sm_100"}
    failures = []
    for record in records:
        try:
            assert_clean(record, **record.expect)
        except AssertionError as failure:
            failures.append(str(failure).splitlines()[0])
    assert not failures, "\n".join(failures)


# Specimens: kernels that have, or lack, what the gate looks for.


@triton.jit
def _product_kernel(a, b, out, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, rows, DEPTH):
        left = tl.load(a + row[:, None] * rows + start + k[None, :])
        right = tl.load(b + column[None, :] * rows + start + k[:, None])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], total)


@triton.jit
def _specialized_kernel(a, b, out, rows, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    left = tl.make_tensor_descriptor(a, [SIZE, rows], [rows, 1], [SIZE, DEPTH])
    right = tl.make_tensor_descriptor(b, [SIZE, rows], [rows, 1], [SIZE, DEPTH])
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in tl.range(0, rows, DEPTH, warp_specialize=True):
        total = tl.dot(left.load([0, start]), right.load([0, start]).T, total)
    at = tl.arange(0, SIZE)
    tl.store(out + at[:, None] * SIZE + at[None, :], total)


def product(name: str, dtype: str, rows: int, columns: int, depth: int, **more) -> CompileCase:
    case = CompileCase(
        name=name,
        kernel=_product_kernel,
        arguments={"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32", "rows": "i32"},
        constants={"ROWS": rows, "COLUMNS": columns, "DEPTH": depth},
        num_warps=4,
        aligned=frozenset({"rows"}),
    )
    return dataclasses.replace(case, **more)


def compile_cases() -> list[CompileCase]:
    """Cases of this module, which the gate takes in place of an operator."""
    specialized = product("specialized", "fp8e4nv", 0, 0, 0)
    return [
        product("wgmma", "bf16", 64, 64, 64, expect={"wgmma": "m64n64k16.f32.bf16.bf16"}),
        product("few rows", "bf16", 16, 64, 64),
        product("spilling", "bf16", 16, 256, 32, options={"maxnreg": 48}),
        product("too few registers", "bf16", 64, 128, 32, options={"maxnreg": 40}),
        product("too much shared memory", "bf16", 64, 256, 128, num_stages=5),
        product("too old", "fp8e4nv", 64, 64, 64, targets=("sm_80",)),
        product("on amd", "bf16", 64, 64, 64, targets=("gfx942",)),
        dataclasses.replace(
            specialized,
            kernel=_specialized_kernel,
            constants={"SIZE": 128, "DEPTH": 128},
            expect={"wgmma": "m64n128k32.f32.e4m3.e4m3", "tma": True, "warp_specialized": True},
        ),
    ]


def test_the_gate_sees_what_is_not_clean():
    here = Path(__file__)
    found = {record.case: record for record in compile_in_subprocess([here.stem], [str(here.parent)])}

    for good in ("wgmma", "specialized"):
        assert_clean(found[good], **found[good].expect)
    assert found["wgmma"].registers > 32 and found["wgmma"].shared >= 2 * 64 * 64 * 2

    with pytest.raises(AssertionError, match=r"few rows, sm_90: no wgmma m64: mma.sync m16n8k16"):
        assert_clean(found["few rows"], wgmma="m64")
    with pytest.raises(AssertionError, match=r"mma.sync: mma.sync m16n8k16.row.col.f32.bf16.bf16.f32"):
        assert_clean(found["few rows"])
    assert_clean(found["few rows"], no_mma_sync=False)

    with pytest.raises(AssertionError, match=r"expected at most 0 spilled bytes, got \d\d+"):
        assert_clean(found["spilling"])
    spilled = max(found["spilling"].spill_stores, found["spilling"].spill_loads)
    assert_clean(found["spilling"], spills=spilled, no_mma_sync=False)
    with pytest.raises(AssertionError, match=r"too few registers, sm_90: .*Insufficient registers"):
        assert_clean(found["too few registers"])

    # The compiler does not mind: only the launch would fail.
    with pytest.raises(AssertionError, match="expected at most 232448 bytes of shared memory, got"):
        assert_clean(found["too much shared memory"])
    with pytest.raises(AssertionError, match="type fp8e4nv not supported in this architecture"):
        assert_clean(found["too old"])
    assert found["on amd"].matrix and found["on amd"].matrix[0].startswith("mfma ")


def test_missing_copies_and_roles_are_seen():
    record = Record("op", "case", "sm_90", registers=64)
    with pytest.raises(AssertionError, match="op, case, sm_90: expected bulk tensor copies, got none"):
        assert_clean(record, tma=True)
    with pytest.raises(AssertionError, match="warps are not specialized"):
        assert_clean(record, warp_specialized=True)
    # Other targets have other instructions: only what holds everywhere is asked of them.
    elsewhere = dataclasses.replace(record, target="sm_100")
    assert_clean(elsewhere, tma=True)
    assert_clean(dataclasses.replace(elsewhere, matrix=("tcgen05 cta_group::1.kind::f16",)), wgmma="m64")
    with pytest.raises(AssertionError, match="op, case, sm_100: no matrix instruction"):
        assert_clean(elsewhere, wgmma="m64")


@pytest.mark.skipif(not interprets(), reason="kernels are compiled in this process")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="expected a process without TRITON_INTERPRET"):
        compile_case(compile_cases()[0], "sm_90")


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="No module named 'no_such_operator'"):
        compile_in_subprocess(["no_such_operator"])
