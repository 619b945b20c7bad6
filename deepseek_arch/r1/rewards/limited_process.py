"""The process in which `code.run_program` runs one program. It is started by its path, and imports the library alone.

A hook ends the process at the first thing that is refused. It raises nothing, so that no traceback leads to its frame,
and calls nothing that a program could replace. What raises no audit event is taken away beforehand.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any

__all__ = ["limit", "main"]

_HOOK = """
def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if type(path) is int or type(path) is str and path in devices:
            return
        if type(path) is not str or type(flags) is not int or flags & writing or ".." in path:
            leave(1)
        if path[:1] == "/" and not path.startswith(libraries) and path not in archives:
            leave(1)
    elif event == "import":
        if arguments[0] in never:
            leave(1)
    elif event.startswith(refused) and event not in harmless:
        leave(1)


def refuse(*given, **named):
    leave(1)
"""
_REFUSED = (
    "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "sqlite3.", "resource.", "fcntl.", "syslog.", "gc.",
    "signal.pthread_kill", "sys._current_frames",
)  # fmt: skip
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")
# Modules that write files, start interpreters or reach memory without an event.
_LOST = (
    "ctypes", "_ctypes", "_interpreters", "_xxsubinterpreters", "_testcapi", "_testinternalcapi", "_sqlite3", "_dbm",
    "_gdbm", "_posixshmem", "readline", "resource",
)  # fmt: skip
_SILENT = (
    "pidfd_open", "mkfifo", "mknod", "setpriority", "sched_setaffinity", "sched_setparam", "sched_setscheduler",
    "setns", "unshare",
)  # fmt: skip
_PATCHED = ("posix", "_signal", "_posixsubprocess")  # a second copy of them would be whole


def limit(seconds: int, memory: int, output: int) -> None:
    """Limits this process for good: resources, the network, files and other processes.

    Args:
        seconds: of processor time.
        memory: bytes of address space.
        output: bytes that may be written.
    """
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET, where the system grants it
    space: dict[str, Any] = {
        "__builtins__": {}, "leave": os._exit, "type": type, "str": str, "int": int,
        "libraries": tuple(path.rstrip("/") + "/" for path in (*sys.path, "/usr/share/zoneinfo")),
        "archives": tuple(path for path in sys.path if path.endswith(".zip")),
        "devices": ("/dev/null", "/dev/stdin", "/dev/stdout", "/dev/stderr"),
        "writing": os.O_WRONLY | os.O_RDWR | os.O_CREAT, "never": (*_PATCHED, *_LOST), "refused": _REFUSED,
        "harmless": _HARMLESS,
    }  # fmt: skip
    exec(_HOOK, space)
    for module, name in (
        *((module, name) for module in ("os", "posix") for name in _SILENT),
        ("signal", "pidfd_send_signal"), ("_signal", "pidfd_send_signal"), ("_posixsubprocess", "fork_exec"),
    ):  # fmt: skip
        if hasattr(__import__(module), name):
            setattr(sys.modules[module], name, space["refuse"])
    sys.modules.update(dict.fromkeys(_LOST))  # type: ignore[arg-type]  # None: not found
    sys.addaudithook(space["hook"])


def main() -> None:
    """Runs the job in the first line of the standard input, and prints the value of its call, if it has one."""
    job = json.loads(sys.stdin.readline())
    # At descriptor 0 too, for programs that read `sys.stdin.buffer` or `open(0)`.
    with open("input", "w+b") as file:
        os.unlink("input")
        file.write(job["input"].encode())
        file.seek(0)
        os.dup2(file.fileno(), 0)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    limit(*job["limits"])
    space = {"__name__": "__main__" if job["call"] is None else "program"}
    exec(compile(job["program"], "program.py", "exec"), space)
    if job["call"] is not None:
        value = eval(compile(job["call"], "call", "eval"), space)
        print("\n" + job["mark"] + json.dumps(value))


if __name__ == "__main__":
    main()
