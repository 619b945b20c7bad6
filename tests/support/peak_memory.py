"""Peak memory of this process within a stretch of a test, whatever ran before it."""

from __future__ import annotations

import gc
from pathlib import Path

__all__ = ["PeakMemory"]

_PROC = Path("/proc/self")


class PeakMemory:
    """Bytes that the process has had at most since this was made, beyond those that it had then.

    The system's record of the peak is reset: `ru_maxrss` is one of the whole life of a process, which an earlier peak
    hides and which counts every module that was ever imported. Where there is no such record, it is always 0.
    """

    def __init__(self) -> None:
        gc.collect()  # what is given back later would make room for what is to be measured
        self.known = (_PROC / "clear_refs").exists()
        if self.known:
            (_PROC / "clear_refs").write_text("5")
        self.before = _bytes("VmRSS") if self.known else 0

    def beyond(self) -> int:
        return max(0, _bytes("VmHWM") - self.before) if self.known else 0


def _bytes(field: str) -> int:
    lines = (_PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
