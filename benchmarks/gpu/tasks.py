"""Tasks of a worker of `python -m benchmarks gpu`: the ceilings, a check, or an operator at one shape."""

from __future__ import annotations

from typing import Any

import torch

from ..core.workers import work
from ..operators.declare import select
from ..operators.measuring import Options, measure
from ..operators.rooflines import measure_ceilings
from ..operators.scales import scale
from .checks import checks
from .sizes import FULL, SMALL, Sizes, Skipped

__all__ = ["perform"]


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """Performs one task and returns its result, as JSON has it.

    Args:
        task: "task" is "ceilings", "check" or "kernel"; "device"; "small" for the sizes of a dry run.

    Raises:
        ValueError: no such task, check, operator or shape; or a check that fails.
    """
    device, small = torch.device(task["device"]), task["small"]
    if task["task"] == "ceilings":
        return {"ceilings": measure_ceilings(device, **_small_ceilings(small)).to_dict()}
    if task["task"] == "check":
        return _check(task["name"], device, SMALL if small else FULL)
    if task["task"] == "kernel":
        return _kernel(task, device, Options(rounds=2, budget_s=0.1, cold=0) if small else Options())
    raise ValueError(f"expected a task among ceilings, check and kernel, got {task['task']!r}")


def _small_ceilings(small: bool) -> dict[str, int]:
    return {"size": 64, "copied": 2**16, "rounds": 2} if small else {}


def _check(name: str, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    try:
        checks(sizes)[name](device, sizes)
    except Skipped as why:
        return {"status": "skipped", "message": str(why)}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"status": "passed", "message": ""}


def _kernel(task: dict[str, Any], device: torch.device, options: Options) -> dict[str, Any]:
    (operator,) = (one for one in select([task["op"]]) if one.name == task["op"])
    shapes = {shape.name: shape for shape in operator.shapes(scale(task["scale"]))}
    row = measure(operator, shapes[task["shape"]], device, options)
    error = row.details.get("error")
    return {"row": row.to_dict()} | ({"error": error} if error else {})


def _healthy() -> bool:
    """Returns True if the GPU's context survived a failure."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    work(perform, _healthy)
