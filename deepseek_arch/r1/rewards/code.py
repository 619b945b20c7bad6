"""Programs judged by running them: a process each, with limits on time, memory and files, and without a network.

The limits keep a trainer alive beside accidents and ordinary reward hacking. They are no wall against a determined
attacker: run the trainer of a strong model in a container.
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
from typing import Any

__all__ = ["CodeLimits", "code_blocks", "grade_code", "run_program"]

_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
LONGEST_PROGRAM = 100_000


@dataclass(frozen=True)
class CodeLimits:
    """Resources that one run of a program may use.

    Attributes:
        seconds: of processor time, and twice that of wall time.
        memory: bytes of address space.
        output: bytes of output that are read; a program that writes more fails.
    """

    seconds: float = 4.0
    memory: int = 1 << 30
    output: int = 1 << 20


# Runs first in the new process: no network (a network namespace of its own where the system grants one, and always a
# hook that refuses sockets), no other programs, no writing outside of its empty folder.
_PROLOGUE = r"""
import sys
def _limit(seconds, memory, output):
    import ctypes, os, resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    try:
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
    except (AttributeError, OSError):
        pass
    refused = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.kill",
               "os.putenv", "ctypes.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown",
               "os.link", "os.symlink", "os.mkdir", "pty.", "signal.pthread_kill")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    def hook(event, arguments):
        if event.startswith(refused):
            raise PermissionError(event)
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & writing or str(path).startswith("/proc"):
                raise PermissionError("open")
    sys.addaudithook(hook)
"""
_RUN = r"""
import json
_job = json.loads(sys.stdin.readline())
_limit(*_job["limits"])
del _limit
"""
_STDIN = (
    _PROLOGUE
    + _RUN
    + r"""
import io
sys.stdin = io.StringIO(_job["input"])
exec(compile(_job["program"], "program.py", "exec"), {"__name__": "__main__"})
"""
)
# The value goes back as JSON and is compared outside: the process knows no expected value.
_CALL = (
    _PROLOGUE
    + _RUN
    + r"""
_space = {"__name__": "program"}
exec(compile(_job["program"], "program.py", "exec"), _space)
_value = eval(compile(_job["call"], "call", "eval"), _space)
print("\n" + _job["mark"] + json.dumps(_value))
"""
)


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
            [sys.executable, "-I", "-S", "-c", _STDIN if call is None else _CALL],
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
