"""Compiles kernels for GPUs that are not there, and reads from the result what decides whether they are fast.

    python -m deepseek_kernels.testing.compile_gate [OPERATOR ...] [--target sm_90] [--json]

prints registers, spilled bytes, shared memory and matrix instructions of every kernel in every configuration of its
table. An operator takes part by `compile_cases()` in its kernel.py, a list of `CompileCase`. The compiler accepts what
the launch refuses (too much shared memory) and what is slow (spills, `mma.sync` where `wgmma` was meant), so
`assert_clean` looks at that.

Needs Triton, which brings ptxas and the disassembler, and a process without TRITON_INTERPRET: there, kernels are Python
functions that no compiler can take.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "SHARED_LIMITS",
    "CompileCase",
    "Record",
    "assert_clean",
    "compile_case",
    "compile_in_subprocess",
    "operators",
]

# Bytes of shared memory that one block may have.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as it would be launched."""

    name: str
    kernel: Any  # what @triton.jit returned
    arguments: Mapping[str, str]  # parameter -> Triton type ("*bf16", "i32"), without the constants
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: frozenset[str] = frozenset()  # integers that are multiples of 16, as all pointers are
    targets: tuple[str, ...] = ("sm_90",)
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of the compiler
    expect: Mapping[str, Any] = field(default_factory=dict)  # what `assert_clean` is to ask for


@dataclass(frozen=True)
class Record:
    """What the compiler made of one case for one target; `error` and nothing else where it refused."""

    op: str
    case: str
    target: str
    registers: int = 0  # per thread; of a warp-specialized kernel, as launched
    spill_stores: int = 0  # bytes per thread
    spill_loads: int = 0
    shared: int = 0  # bytes per block
    instructions: int = 0
    tma: int = 0  # bulk tensor copies, in the text
    warp_specialized: bool = False
    matrix: tuple[str, ...] = ()  # kinds of matrix instructions: "wgmma m64n128k32.f32.e4m3.e4m3"
    expect: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def assert_clean(
    record: Record,
    *,
    spills: int = 0,
    shared_limit: int | None = None,
    wgmma: str | None = None,
    no_mma_sync: bool = True,
    tma: bool = False,
    warp_specialized: bool = False,
) -> None:
    """Asserts that a compiled kernel has nothing that makes it slow or unable to start.

    Args:
        spills: budget of spilled bytes (stored or loaded, whichever is more) per thread.
        shared_limit: bytes; None for what the target has.
        wgmma: start of the kind that must be there, "m64n128k32.f32.e4m3". Like the three below, it is looked at on
            Hopper only: other targets have other instructions, and must have any.
        no_mma_sync: whether a single `mma.sync` is an error.
        tma: whether there must be bulk tensor copies.
        warp_specialized: whether warps must have been given different parts of the work.
    """
    where = f"{record.op}, {record.case}, {record.target}"
    assert not record.error, f"{where}: {record.error}"
    spilled = max(record.spill_stores, record.spill_loads)
    assert spilled <= spills, f"{where}: expected at most {spills} spilled bytes, got {spilled}"
    limit = SHARED_LIMITS[record.target] if shared_limit is None else shared_limit
    assert record.shared <= limit, f"{where}: expected at most {limit} bytes of shared memory, got {record.shared}"
    # Triton 3.6 makes an empty kernel for sm_100 of what needs more tensor memory than there is, and says nothing.
    assert record.matrix or wgmma is None, f"{where}: no matrix instruction"
    if record.target != "sm_90":
        return
    kinds = ", ".join(record.matrix) or "no matrix instruction"
    if wgmma is not None:
        assert any(kind.startswith(f"wgmma {wgmma}") for kind in record.matrix), f"{where}: no wgmma {wgmma}: {kinds}"
    if no_mma_sync:
        assert not any(kind.startswith("mma.sync") for kind in record.matrix), f"{where}: mma.sync: {kinds}"
    assert record.tma or not tma, f"{where}: expected bulk tensor copies, got none"
    assert record.warp_specialized or not warp_specialized, f"{where}: warps are not specialized"


def operators() -> list[str]:
    """Names of the operators that have Triton kernels; none is imported."""
    return sorted(_modules())


def _modules() -> dict[str, str]:
    """Modules of kernels by operator: `family/operator/kernel.py`."""
    paths = Path(__file__).parent.parent.glob("*/*/kernel.py")
    return {path.parent.name: f"deepseek_kernels.{path.parent.parent.name}.{path.parent.name}.kernel" for path in paths}


def compile_case(case: CompileCase, target: str, op: str = "", count: bool = False) -> Record:
    """Compiles one case; a refusal of the compiler is recorded, not raised.

    Args:
        op: for the record.
        count: whether to count instructions, which takes longer than a compilation that is in Triton's cache.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    compiler = importlib.import_module("triton.compiler")
    if type(case.kernel).__name__ == "InterpretedFunction":
        raise RuntimeError("expected a process without TRITON_INTERPRET, got kernels that are interpreted")
    names = case.kernel.arg_names
    # A table of arguments may serve several kernels: what is not a parameter of this one is left out.
    source = compiler.ASTSource(
        case.kernel,
        {name: case.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name in case.aligned or case.arguments.get(name, "").startswith("*")
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the assembler refuses, Triton prints the whole text
            kernel = compiler.compile(source, target=_gpu_target(target), options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        line = next((line for line in lines if re.match(r"ptxas\S* (fatal|error)", line)), lines[-1])
        return Record(op, case.name, target, error=f"{type(error).__name__}: {line}")
    found = _read_amd(kernel.asm) if target.startswith("gfx") else _read_nvidia(kernel.asm, count)
    return Record(op, case.name, target, shared=kernel.metadata.shared, expect=dict(case.expect), **found)


def _gpu_target(target: str) -> Any:
    cls = importlib.import_module("triton.backends.compiler").GPUTarget
    if target not in SHARED_LIMITS:
        raise ValueError(f"expected a target among {', '.join(SHARED_LIMITS)}, got {target!r}")
    return cls("hip", target, 64) if target.startswith("gfx") else cls("cuda", int(target.removeprefix("sm_")), 32)


def _read_nvidia(asm: Mapping[str, Any], count: bool) -> dict[str, Any]:
    tools = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        # Without a stack nothing is spilled, and the disassembler, slower than the compiler, is not needed.
        spills = re.search(r"STACK:0 .*LOCAL:0 ", usage) is None
        listing = _run(tools / "nvdisasm", "-c", file.name) if spills or count else ""
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.M)
    ptx = asm["ptx"]
    kinds = {
        *(f"wgmma {kind}" for kind in re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", ptx)),
        *(f"mma.sync {kind}" for kind in re.findall(r"\bmma\.sync\.aligned\.([\w.]+)", ptx)),
        *(f"tcgen05 {kind}" for kind in re.findall(r"tcgen05\.mma\.([\w.:]+)", ptx)),
    }
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_stores": sum(_bytes(name) for name in code if name.startswith("STL")),
        "spill_loads": sum(_bytes(name) for name in code if name.startswith("LDL")),
        "instructions": sum(name != "NOP" for name in code) if count else 0,
        "tma": ptx.count("cp.async.bulk.tensor"),
        "warp_specialized": "setmaxnreg" in ptx,
        "matrix": tuple(sorted(kinds)),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return {
        "registers": number("vgpr_count"),
        "spill_stores": spilled,
        "spill_loads": spilled,
        "instructions": len(re.findall(r"^\s+[sv]_\w+|^\s+(?:ds|buffer|global|flat)_\w+", text, re.M)),
        "matrix": tuple(sorted({f"mfma {kind}" for kind in re.findall(r"v_mfma_(\w+)", text)})),
    }


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _bytes(instruction: str) -> int:
    """Of a load or store to local memory, per thread: STL.64 has 8."""
    width = re.search(r"\.(8|U8|S8|16|U16|S16|64|128)\b", instruction)
    return int(width[1].lstrip("US")) // 8 if width else 4


def _compile(names: Iterable[str], targets: Iterable[str] | None, count: bool) -> list[Record]:
    records = []
    for name in names:
        module = importlib.import_module(_modules().get(name, name))
        for case in module.compile_cases():
            chosen = [target for target in case.targets if targets is None or target in targets]
            records += [compile_case(case, target, name, count) for target in chosen]
    return records


def compile_in_subprocess(names: Iterable[str], path: Iterable[str] = ()) -> list[Record]:
    """The records of operators, or of modules found on `path`, from a process that does not interpret.

    Raises:
        RuntimeError: that process failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, sys.path)])
    command = [sys.executable, "-m", __name__, *names, "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return [Record(**{**row, "matrix": tuple(row["matrix"])}) for row in json.loads(run.stdout)]


def _table(records: Iterable[Record]) -> str:
    head = ("operator", "case", "target", "registers", "spill", "shared", "instructions", "TMA", "matrix instructions")
    rows = [head]
    for r in records:
        spills = f"{r.spill_stores}/{r.spill_loads}"
        numbers = (r.registers, spills, r.shared, r.instructions, r.tma, r.error or ", ".join(r.matrix) or "-")
        rows.append((r.op, r.case, r.target, *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deepseek_kernels.testing.compile_gate")
    parser.add_argument("operators", nargs="*", help="all by default; also any module that has compile_cases()")
    parser.add_argument("--target", action="append", choices=[*SHARED_LIMITS], help="may be given several times")
    parser.add_argument("--json", action="store_true", help="records instead of a table")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which has not happened yet
    # Triton 3.10 will change the default; said here, the numbers do not move with it, and 3.9 does not warn.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    records = _compile(options.operators or operators(), options.target, count=not options.json)
    print(json.dumps([asdict(record) for record in records]) if options.json else _table(records))


if __name__ == "__main__":
    main()
