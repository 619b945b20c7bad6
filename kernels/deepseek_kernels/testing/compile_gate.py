"""Compiles kernels without a GPU, for any target, and reads from the result the numbers that decide their speed.

    python -m deepseek_kernels.testing.compile_gate [OPERATOR ...] [--target sm_90] [--json]

prints registers, spilled bytes, shared memory and matrix instructions of every kernel in every configuration of its
table. An operator takes part by a module `compile_cases` in its folder, with a function `compile_cases()` that returns
a list of `CompileCase`. The compiler accepts kernels that the launch refuses (too much shared memory) and slow ones
(spills, `mma.sync` where `wgmma` was meant): `assert_clean` finds those.

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
from collections.abc import Iterable, Iterator, Mapping
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

# Type of a kernel's argument: Triton's name ("*bf16", "i32"), with ":16" behind it for an integer that is a multiple of
# 16; a tuple of types; or, inside a tuple, a number that is a constant to the compiler.
Kind = str | int | tuple["Kind", ...]

# Bytes of shared memory that one block may have.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as it would be launched."""

    name: str
    kernel: Any  # a function under @triton.jit
    arguments: Mapping[str, Kind]  # by parameter, without the constants
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: frozenset[str] = frozenset()  # integers that are multiples of 16, as all pointers are
    targets: tuple[str, ...] = ("sm_90",)
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of the compiler
    expect: Mapping[str, Any] = field(default_factory=dict)  # arguments of `assert_clean`

    @classmethod
    def of_config(
        cls, config: Any, arguments: Mapping[str, Kind], constants: Mapping[str, Any], **rest: Any
    ) -> CompileCase:
        """Returns a case with the warps, stages and register limit of an operator's configuration.

        Args:
            config: has `num_warps`, `num_stages` and `maxnreg`.
            constants: of which those are left out that are among the arguments.
            rest: other fields.
        """
        return cls(
            arguments=arguments,
            constants={name: value for name, value in constants.items() if name not in arguments},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            options={} if config.maxnreg is None else {"maxnreg": config.maxnreg},
            **rest,
        )


@dataclass(frozen=True)
class Record:
    """Compiler's result for one case and one target; `error` and nothing else if it refused."""

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
    """Returns the names of the operators that have cases; none is imported."""
    return sorted(_modules())


def _modules() -> dict[str, str]:
    """Returns modules of cases by operator: `family/operator/compile_cases.py`."""
    paths = Path(__file__).parent.parent.glob("*/*/compile_cases.py")
    return {path.parent.name: ".".join(["deepseek_kernels", *path.parts[-3:-1], "compile_cases"]) for path in paths}


def compile_case(case: CompileCase, target: str, op: str = "", count: bool = False) -> Record:
    """Compiles one case; a refusal of the compiler is recorded, not raised.

    Args:
        op: operator's name, for the record.
        count: whether to count instructions, which takes longer than a compilation that is in Triton's cache.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    compiler = importlib.import_module("triton.compiler")
    if type(case.kernel).__name__ == "InterpretedFunction":
        raise RuntimeError("expected a process without TRITON_INTERPRET, got kernels that are interpreted")
    source = compiler.ASTSource(case.kernel, **_specialization(case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the assembler refuses, Triton prints the whole text
            kernel = compiler.compile(source, target=_gpu_target(target), options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        line = next((line for line in lines if re.match(r"ptxas\S* (fatal|error)", line)), lines[-1])
        return Record(op, case.name, target, error=f"{type(error).__name__}: {line}")
    read = _read_amd(kernel.asm) if target.startswith("gfx") else _read_nvidia(kernel.asm, count)
    return Record(op, case.name, target, shared=kernel.metadata.shared, expect=dict(case.expect), **read)


def _specialization(case: CompileCase) -> dict[str, Any]:
    """Returns the types, constants and alignments of a kernel's parameters, as the compiler takes them.

    A table of arguments may serve several kernels: those that are no parameters of this one are left out.
    """
    names = case.kernel.arg_names
    kinds = {name: case.arguments.get(name, "constexpr") for name in names}
    leaves = [leaf for index, name in enumerate(names) for leaf in _leaves(kinds[name], (index,), name in case.aligned)]
    constants: dict[tuple[int, ...], Any] = {path: kind for path, kind, _ in leaves if isinstance(kind, int)}
    return {
        "signature": {name: _signature(kind) for name, kind in kinds.items()},
        "constexprs": constants | {(names.index(name),): value for name, value in case.constants.items()},
        "attrs": {path: [["tt.divisibility", 16]] for path, _, aligned in leaves if aligned},
    }


def _signature(kind: Kind) -> Any:
    if isinstance(kind, tuple):
        return tuple(_signature(one) for one in kind)
    return "constexpr" if isinstance(kind, int) else kind.removesuffix(":16")


def _leaves(kind: Kind, path: tuple[int, ...], aligned: bool) -> Iterator[tuple[tuple[int, ...], str | int, bool]]:
    """Yields the place, the type and the alignment of each argument, those in tuples one by one."""
    if isinstance(kind, tuple):
        for index, one in enumerate(kind):
            yield from _leaves(one, (*path, index), aligned)
    else:
        yield path, kind, isinstance(kind, str) and (aligned or kind.startswith("*") or kind.endswith(":16"))


def _gpu_target(target: str) -> Any:
    cls = importlib.import_module("triton.backends.compiler").GPUTarget
    if target not in SHARED_LIMITS:
        raise ValueError(f"expected a target among {', '.join(SHARED_LIMITS)}, got {target!r}")
    return cls("hip", target, 64) if target.startswith("gfx") else cls("cuda", int(target.removeprefix("sm_")), 32)


def _read_nvidia(asm: Mapping[str, Any], count: bool) -> dict[str, Any]:
    tools = Path(str(importlib.import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin"
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
        "registers": _number(r"REG:(\d+)", usage),
        "spill_stores": sum(_bytes(name) for name in code if name.startswith("STL")),
        "spill_loads": sum(_bytes(name) for name in code if name.startswith("LDL")),
        "instructions": sum(name != "NOP" for name in code) if count else 0,
        "tma": ptx.count("cp.async.bulk.tensor"),
        "warp_specialized": "setmaxnreg" in ptx,
        "matrix": tuple(sorted(kinds)),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    spilled = 4 * sum(_number(rf"\.{kind}_spill_count:\s+(\d+)", text) for kind in ("vgpr", "sgpr"))
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "spill_stores": spilled,
        "spill_loads": spilled,
        "instructions": len(re.findall(r"^\s+[sv]_\w+|^\s+(?:ds|buffer|global|flat)_\w+", text, re.M)),
        "matrix": tuple(sorted({f"mfma {kind}" for kind in re.findall(r"v_mfma_(\w+)", text)})),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"expected {pattern} in the compiler's output, got {text[:500]!r}")
    return int(match[1])


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _bytes(instruction: str) -> int:
    """Returns the bytes of a load or store to local memory, per thread: STL.64 has 8."""
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
    """Returns the records of operators, or of modules found on `path`, from a process that does not interpret.

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
    rows: list[tuple[str, ...]] = [head]
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
    # Triton 3.10 will change the default: set here, the numbers do not move with it, and 3.9 does not warn.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    records = _compile(options.operators or operators(), options.target, count=not options.json)
    print(json.dumps([asdict(record) for record in records]) if options.json else _table(records))


if __name__ == "__main__":
    main()
