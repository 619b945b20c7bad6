"""Tasks whose memory is measured, or that may have to be stopped, each in a process of its own.

`python -m benchmarks.core.isolated '{"task": ...}'` prints a line of JSON after each repetition: the seconds of the
work itself, the resident memory before it, and its peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["run", "run_isolated"]

ROOT = Path(__file__).resolve().parents[2]


def run_isolated(task: str, *, repeats: int = 1, limit_s: float | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Runs `task` in a fresh interpreter, `repeats` times or as often as it can within `limit_s` seconds.

    Returns:
        "seconds", "before" and "peak" (bytes) of each finished repetition; none if it was stopped before.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote last.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.core.isolated",
        json.dumps({"task": task, "repeats": repeats, **settings}),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired as stopped:
        return _results(stopped.stdout or b"")
    if done.returncode:
        raise RuntimeError(f"{task} failed with exit status {done.returncode}: {done.stderr.decode()[-2000:]}")
    return _results(done.stdout)


def _results(output: bytes) -> list[dict[str, Any]]:
    # A line that the end of the process cut off has no line end.
    return [json.loads(line) for line in output.decode().split("\n")[:-1] if line.startswith('{"seconds"')]


def run(settings: dict[str, Any]) -> None:
    """Prepares a task (imports, models), then measures its work."""
    import torch

    if settings["task"] not in _TASKS:
        raise ValueError(f"expected a task among {', '.join(_TASKS)}, got no such task as {settings['task']!r}")
    torch.set_num_threads(settings["threads"])
    work = _TASKS[settings["task"]](settings)
    before = _status("VmRSS")
    for _ in range(settings["repeats"]):
        start = time.perf_counter()
        kept = work()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "before": before, "peak": _status("VmHWM")}), flush=True)
        del kept


def _status(field: str) -> int:
    """Resident bytes, now (VmRSS) or at most (VmHWM).

    Not `ru_maxrss` where it can be helped: Linux hands a child the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------ tasks: settings -> the work to measure


def _read(settings: dict[str, Any]) -> Callable[[], object]:
    """Reads every shard into new memory: what a loader has to do at least."""
    files = sorted(Path(settings["folder"]).glob("*.safetensors"))
    return lambda: [file.read_bytes() for file in files]


def _load_ours(settings: dict[str, Any]) -> Callable[[], object]:
    import deepseek_arch as da

    load = da.load  # imported here, not within the measured time
    return lambda: _touch(load(settings["folder"]))


def _load_native(settings: dict[str, Any]) -> Callable[[], object]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    native_class = getattr(transformers, settings["native_class"])
    return lambda: _touch(native_class.from_pretrained(settings["folder"], dtype="auto"))


def _touch(model: Any) -> Any:
    """Reads a value of every memory page, so that a mapped file counts when its bytes arrive."""
    for tensor in model.state_dict().values():
        tensor.flatten()[:: 4096 // tensor.element_size()].sum()
    return model


def _train(settings: dict[str, Any]) -> Callable[[], object]:
    import torch

    import deepseek_arch as da

    from ..models.contestants import DTYPES, native_twin, random_model, training_step

    model: Any = random_model(da.DeepseekConfig.from_dict(settings["config"]), DTYPES[settings["dtype"]])
    if settings["native"]:
        model = native_twin(model)
    ids = torch.randint(model.config.vocab_size, (1, settings["tokens"]))

    def work() -> object:
        model.zero_grad(set_to_none=True)
        return training_step(model, ids)

    return work


_TASKS: dict[str, Callable[[dict[str, Any]], Callable[[], object]]] = {
    "read": _read,
    "load ours": _load_ours,
    "load native": _load_native,
    "train": _train,
}

if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
