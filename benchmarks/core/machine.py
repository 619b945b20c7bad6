"""The GPU that a benchmark ran on, and its clocks, power and temperature while it did."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from .report import machine

__all__ = ["describe_machine", "gpu_state"]

_VARIABLES = ("TRITON_", "DEEPSEEK_", "PTXAS_", "CUDA_VISIBLE")

# What nvidia-smi calls it -> what a report does, and its unit.
_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
    "clocks_event_reasons.active": "throttled",  # a mask; 0x4 is the power cap
}


def describe_machine() -> dict[str, Any]:
    """`harness.machine`, and on a GPU machine what it adds: the device, the driver, what is set in the environment."""
    facts = machine()
    if not torch.cuda.is_available():
        return facts
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return facts | {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": (_query("driver_version") or [None])[0],
        "state": gpu_state(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def gpu_state() -> dict[str, Any] | None:
    """Clocks, power and temperature now; None where nvidia-smi does not say."""
    values = _query(*_STATE)
    return None if values is None else {name: _number(v) for name, v in zip(_STATE.values(), values, strict=True)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _query(*fields: str) -> list[str] | None:
    """These fields of the current device, as nvidia-smi prints them."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    # Only what CUDA may see is numbered there; nvidia-smi numbers all devices, or takes their names.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    device = visible.split(",")[index] if visible else str(index)
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else None
