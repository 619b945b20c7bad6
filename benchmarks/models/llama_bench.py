"""llama.cpp as a contestant: its program `llama-bench` on a GGUF file of the same tensors (`gguf_file`)."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.report import Samples

__all__ = ["LLAMA", "LlamaBench"]

LLAMA = "llama.cpp"


@dataclass(frozen=True)
class LlamaBench:
    """Runs `llama-bench`, which loads the file anew each time.

    Args:
        program: path of `llama-bench`.
        model: path of the GGUF file.
        limit_s: seconds that one run may take, loading included. It fills the cache of a context by computing it.

    Raises:
        ValueError: one of the files is missing.
    """

    program: str
    model: str
    threads: int
    limit_s: float

    def __post_init__(self) -> None:
        for path in (self.program, self.model):
            if not Path(path).is_file():
                raise ValueError(f"expected llama-bench and a GGUF file, got no file {path}")

    def decode(self, context: int, tokens: int, rounds: int) -> Samples | str:
        """Returns the seconds of a token behind `context` others, a sample for each round of `tokens`; or why not."""
        result = self._run("-p", "0", "-n", str(tokens), "-d", str(context), "-r", str(rounds))
        return result if isinstance(result, str) else result.map(lambda seconds: seconds / tokens)

    def prefill(self, tokens: int, rounds: int) -> Samples | str:
        """Returns the seconds of a prompt of `tokens`; or why there are none."""
        return self._run("-p", str(tokens), "-n", "0", "-r", str(rounds))

    def _run(self, *test: str) -> Samples | str:
        fixed = ("-m", self.model, "-t", str(self.threads), "-fa", "1", "-o", "json")
        try:
            done = subprocess.run(
                [self.program, *fixed, *test], capture_output=True, text=True, timeout=self.limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"{LLAMA} stopped after {self.limit_s:.0f} s"
        except OSError as error:
            return f"{LLAMA}: {error}"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"{LLAMA} failed with exit status {done.returncode}: {last[:200]}"
        return _seconds(done.stdout)


def _seconds(output: str) -> Samples | str:
    """The seconds of each repetition of the one test in the output."""
    try:
        tests: list[dict[str, Any]] = json.loads(output)
        return Samples(tuple(nanoseconds / 1e9 for nanoseconds in tests[0]["samples_ns"]))
    except (ValueError, LookupError, TypeError) as error:
        return f"{LLAMA}: expected the samples of one test, got {type(error).__name__}: {error}"
