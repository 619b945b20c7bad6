"""Judgements of answers in a process of their own.

Libraries that judge what a model wrote hand it to sympy or evaluate it, which can take for ever or all of the memory
(`9^{9^{9^9}}`), and their own time limits work in the main thread only. The process is started when first needed, is
limited in memory and writes no files, and is replaced when an answer takes too long or kills it.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import weakref
from typing import Any

__all__ = ["AnswerProcess"]

_START_SECONDS = 120.0  # importing sympy on a busy machine
_MEMORY = 4 << 30

# `python -c`, so that the process imports nothing of this package.
_PROGRAM = """
import json, os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
replies = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr = open(os.devnull, "w")
import logging
logging.disable(logging.CRITICAL)
{judge}
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
replies.write("ready\\n"); replies.flush()
for line in sys.stdin:
    try:
        right = bool(judge(*json.loads(line)))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        right = False
    replies.write(json.dumps(right) + "\\n"); replies.flush()
"""

_open: weakref.WeakSet[AnswerProcess] = weakref.WeakSet()


class AnswerProcess:
    """A process that runs `judge` on one answer at a time.

    Args:
        name: of the library, for errors.
        judge: source of imports and of a function `judge`, whose arguments are JSON and whose result is true or false.
        seconds: time for one answer. What takes longer is wrong.
    """

    def __init__(self, name: str, judge: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._program = _PROGRAM.format(memory=_MEMORY, judge=judge)
        self._running: _Process | None = None
        self._lock = threading.Lock()
        _open.add(self)

    def judge(self, *arguments: Any) -> bool:
        """Returns the verdict; False where the process takes too long or ends.

        Raises:
            RuntimeError: the process does not start.
        """
        with self._lock:
            if self._running is None:
                self._running = _Process(self.name, self._program)
            verdict = self._running.ask(json.dumps(arguments), self.seconds)
            if verdict is None:
                self._end()
        return bool(verdict)

    def close(self) -> None:
        """Ends the process, if it runs; the next answer starts another one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


class _Process:
    """A running process and its pipes."""

    def __init__(self, name: str, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.replies.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.replies, selectors.EVENT_READ)
        if self._reply(_START_SECONDS) != "ready":
            self.close()
            raise RuntimeError(f"expected {name} to start in a process of its own, got none")

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

    def ask(self, request: str, seconds: float) -> bool | None:
        """Returns the verdict, None where the process has to be replaced."""
        try:
            self.requests.write((request + "\n").encode())
            self.requests.flush()
        except OSError:
            return None
        reply = self._reply(seconds)
        return None if reply is None else reply == "true"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.selector.close()
        self.requests.close()
        self.replies.close()


@atexit.register
def _close_all() -> None:
    for process in list(_open):
        process.close()
