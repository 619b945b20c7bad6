"""Equality of mathematical expressions by math-verify, in a process of its own.

math-verify hands what a model wrote to sympy, which can take for ever or all of the memory (`9^{9^{9^9}}`), and its
own time limits work in the main thread only. The process is started when first needed, is limited in memory, and is
replaced when an answer takes too long.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading

__all__ = ["SECONDS", "close", "equal_expressions"]

SECONDS = 5.0
"""Time for one comparison. What takes longer is not equal."""
_START_SECONDS = 120.0  # importing sympy on a busy machine
_MEMORY = 4 << 30

# `python -c`, so that the process imports nothing of this package.
_PROGRAM = f"""
import json, os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
replies = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr = open(os.devnull, "w")
import logging
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
replies.write("ready\\n"); replies.flush()
for line in sys.stdin:
    answer, reference = json.loads(line)
    try:
        gold, given = (parse("\\\\boxed{{" + text + "}}", parsing_timeout=4) for text in (reference, answer))
        same = bool(gold and given and verify(gold, given, timeout_seconds=4))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        same = False
    replies.write(json.dumps(same) + "\\n"); replies.flush()
"""


class _Process:
    """The process and its pipes."""

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "expected math-verify to compare expressions that are no plain numbers, got none: "
                'pip install "deepseek-arch[r1]"'
            )
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.replies.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.replies, selectors.EVENT_READ)
        if self._reply(_START_SECONDS) != "ready":
            self.close()
            raise RuntimeError("expected math-verify to start in a process of its own, got none")

    def _reply(self, seconds: float) -> str | None:
        """Returns the next line of the process, None where it is late or dead."""
        line = b""
        while not line.endswith(b"\n"):
            if not self.selector.select(seconds):
                return None
            part = self.replies.read()
            if not part:
                return None
            line += part
        return line.decode().strip()

    def equal(self, answer: str, reference: str) -> bool | None:
        """Returns the verdict, None where the process has to be replaced."""
        try:
            self.requests.write((json.dumps([answer, reference]) + "\n").encode())
            self.requests.flush()
        except OSError:
            return None
        reply = self._reply(2 * SECONDS)  # parsing and comparing have 4 s each in there
        return None if reply is None else reply == "true"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.selector.close()
        self.requests.close()
        self.replies.close()


_process: _Process | None = None
_lock = threading.Lock()


def equal_expressions(answer: str, reference: str) -> bool:
    """Returns True where math-verify finds both LaTeX expressions equal.

    An answer with unbalanced braces, or one that takes longer than `SECONDS` or too much memory, is not.

    Raises:
        ImportError: math-verify is missing.
    """
    global _process
    if not _balanced(answer):
        return False
    with _lock:
        if _process is None:
            _process = _Process()
        verdict = _process.equal(answer, reference)
        if verdict is None:
            _process.close()
            _process = None
    return bool(verdict)


def _balanced(text: str) -> bool:
    """Returns True where braces close in order: an answer must not end the box that it is compared in."""
    depth, escaped = 0, False
    for character in text:
        if escaped or character == "\\":
            escaped = not escaped
            continue
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


@atexit.register
def close() -> None:
    """Ends the process, if it runs; the next comparison starts another one."""
    global _process
    with _lock:
        if _process is not None:
            _process.close()
            _process = None
