"""Programs judged by running them: a process each, with limits on time, memory and files, and without a network.

A program reads its input, Python's own library and nothing else; it writes what it prints, starts no process and
signals none. The limits keep a trainer alive beside accidents and ordinary reward hacking. They are no wall against a
determined attacker: run the trainer of a strong model in a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CodeLimits", "code_blocks", "grade_code", "run_program"]

_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
LONGEST_PROGRAM = 100_000


@dataclass(frozen=True)
class CodeLimits:
    """Resources that one run of a program may use.

    Attributes:
        seconds: of processor time; of wall time twice that and 5 more, for the start on a busy machine.
        memory: bytes of address space.
        output: bytes of output that are read; a program that writes more fails.
    """

    seconds: float = 4.0
    memory: int = 1 << 30
    output: int = 1 << 20


_PROCESS = Path(__file__).with_name("limited_process.py")


def code_blocks(text: str) -> list[str]:
    """Returns the contents of the fenced blocks of `text` that are Python or name no language."""
    return _BLOCK.findall(text)


def run_program(
    program: str, *, stdin: str = "", call: str | None = None, limits: CodeLimits | None = None
) -> tuple[bool, str]:
    """Runs a Python program in a limited process.

    Args:
        program: its source.
        stdin: what it reads.
        call: an expression to evaluate afterwards instead of running the program as a script with `stdin`.

    Returns:
        Whether it ended by itself without an error, and what it printed; with `call` the value as JSON.
    """
    limits = limits or CodeLimits()
    mark = os.urandom(12).hex()
    job = {
        "program": program,
        "input": stdin,
        "call": call,
        "mark": mark,
        "limits": [max(1, round(limits.seconds)), limits.memory, limits.output],
    }
    with tempfile.TemporaryDirectory(prefix="program-") as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROCESS)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:replace"},
            start_new_session=True,
        )
        try:
            process.communicate((json.dumps(job) + "\n").encode(), timeout=2 * limits.seconds + 5)
        except subprocess.TimeoutExpired:
            return False, ""
        finally:
            # Also what it may have started: the session's group goes as a whole.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read(limits.output + 1).decode(errors="replace")
    if process.returncode != 0 or len(text) > limits.output:
        return False, ""
    if call is None:
        return True, text
    _before, found, value = text.rpartition(mark)
    return (True, value.strip()) if found else (False, "")


def grade_code(answer: str, reference: str, data: Mapping[str, Any]) -> float:
    """Returns 1.0 for a program that passes all tests.

    Args:
        answer: the program, or a text with exactly one fenced block that holds it.
        reference: JSON list of tests, each {"input": text, "output": text} or {"call": expression, "returns": value}.
        data: "seconds" and "memory", other limits than `CodeLimits`.

    Raises:
        ValueError: tests that are neither.
    """
    tests = _tests(reference)
    blocks = code_blocks(answer)
    if len(blocks) > 1 or (not blocks and "```" in answer) or len(answer) > LONGEST_PROGRAM:
        return 0.0
    program = blocks[0] if blocks else answer
    if not program.strip():
        return 0.0
    defaults = CodeLimits()
    limits = CodeLimits(float(data.get("seconds", defaults.seconds)), int(data.get("memory", defaults.memory)))
    return float(all(_passes(program, test, limits) for test in tests))


def _tests(reference: str) -> Sequence[Mapping[str, Any]]:
    try:
        tests = json.loads(reference)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected tests as a JSON list, got {reference[:80]!r}") from error
    kinds = ({"input", "output"}, {"call", "returns"})
    if not isinstance(tests, list) or not tests or any(not isinstance(t, dict) or set(t) not in kinds for t in tests):
        raise ValueError(
            'expected a list of at least one test {"input", "output"} or {"call", "returns"}, got ' + reference[:80]
        )
    return tests


def _passes(program: str, test: Mapping[str, Any], limits: CodeLimits) -> bool:
    if "call" in test:
        fine, text = run_program(program, call=test["call"], limits=limits)
        try:
            return fine and json.loads(text) == test["returns"]
        except json.JSONDecodeError:
            return False
    fine, text = run_program(program, stdin=test["input"], limits=limits)
    return fine and text.split() == str(test["output"]).split()
