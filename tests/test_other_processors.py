"""Libraries on older processors: torch chooses its kernels by ATEN_CPU_CAPABILITY, oneDNN by ONEDNN_MAX_CPU_ISA.

Both variables only remove instructions: a machine with AVX-512 computes as machines with AVX2, or with neither. The
choices of our own code are tested on every machine (`processor_sides`). A sample of tests, with whole models, runs in a
process of its own, since both variables are read once.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OLDER = {  # by name: the variables, and the capability that torch then reports
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2"),
    "default": ({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, "DEFAULT"),
}
SAMPLE = {  # file name: tests of it, as `-k` selects them
    "test_fp8_weight_gemm.py": "product_and_gradient",
    "test_gemm.py": "and_gradients",
    "test_model.py": "logits_equal_the_equations or as_good_as_its_roundings",
    "test_mla.py": "as_good_as_its_roundings",
    "test_model_parity.py": "loss_and_every_gradient",
    "test_readme.py": "blocks_are_short_and_run",
}

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the variables name instructions of x86"
)


def run(older: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **OLDER[older][0], "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("older", OLDER)
def test_libraries_take_the_older_path(older):
    """Checks the condition of the other tests, and that doctor's list of operators names the side."""
    code = (
        "import torch, deepseek_kernels as k; print(torch.backends.cpu.get_cpu_capability());"
        "print(k.dispatch.native_half_matmul()); print(next(c.reason for c in k.describe() if c.op == 'dense_gemm'))"
    )
    capability, native, reason = run(older, "-c", code).stdout.splitlines()
    assert (capability, native) == (OLDER[older][1], "False")
    assert torch.cuda.is_available() or f"CPU {capability} has no 16-bit products" in reason


@pytest.mark.slow
@pytest.mark.parametrize("older", OLDER)
def test_the_sample_passes_on_an_older_processor(older):
    files = [str(next(TESTS.rglob(name))) for name in SAMPLE]
    chosen = " or ".join(f"({name.removesuffix('.py')} and ({tests}))" for name, tests in SAMPLE.items())
    result = run(older, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, *files)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    for name in SAMPLE:  # a renamed test would be left out silently
        assert re.search(rf"^PASSED \S*{name}::", result.stdout, re.MULTILINE), name
