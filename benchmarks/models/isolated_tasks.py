"""Tasks of the whole-model benchmarks that need a process of their own: for its memory, or to be stopped.

`run_isolated("benchmarks.models.isolated_tasks", {"task": name, ...})` performs one of them. Each result is one
repetition: the seconds of the work itself by the wall and by the CPU, the page faults in it, the resident memory before
the first one, and the peak so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.machine import page_faults, peak_memory, resident_memory
from ..core.workers import work

__all__ = ["perform"]


def perform(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Prepares a task (imports, models), then measures each repetition of its work.

    Args:
        settings: "task", "threads", "repeats" (default 1), and what the task needs.

    Raises:
        ValueError: an unknown task.
    """
    if settings["task"] not in _TASKS:
        raise ValueError(f"expected a task among {', '.join(_TASKS)}, got no such task as {settings['task']!r}")
    torch.set_num_threads(settings["threads"])
    action = _TASKS[settings["task"]](settings)
    before = resident_memory()
    for _ in range(settings.get("repeats", 1)):
        start, cpu, faults = time.perf_counter(), time.process_time(), page_faults()
        result = action()
        seconds, cpu, faults = time.perf_counter() - start, time.process_time() - cpu, page_faults() - faults
        yield {"seconds": seconds, "cpu": cpu, "faults": faults, "before": before, "peak": peak_memory()}
        del result


# ------------------------------------------------------------------ tasks: settings -> the work to measure


def _read(settings: dict[str, Any]) -> Callable[[], object]:
    """Reads every shard into new memory, which is the least that a loader has to do."""
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
    import deepseek_arch as da

    from .actions import training_step
    from .contestants import DTYPES, native_twin, random_model

    model: Any = random_model(da.DeepseekConfig.from_dict(settings["config"]), DTYPES[settings["dtype"]])
    if settings["native"]:
        model = native_twin(model)
    ids = torch.randint(model.config.vocab_size, (1, settings["tokens"]))

    def step() -> object:
        model.zero_grad(set_to_none=True)
        return training_step(model, ids)

    return step


def _moe_block(settings: dict[str, Any]) -> Callable[[], object]:
    from .fp8_weights import moe_block

    return moe_block()


_TASKS: dict[str, Callable[[dict[str, Any]], Callable[[], object]]] = {
    "read": _read,
    "load ours": _load_ours,
    "load native": _load_native,
    "train": _train,
    "MoE block": _moe_block,
}

if __name__ == "__main__":
    work(perform)
