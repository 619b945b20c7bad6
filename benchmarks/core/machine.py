"""Facts about the machine that a benchmark ran on: processor, GPU, clocks, versions, memory, load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deepseek_kernels import dispatch

__all__ = [
    "available_memory",
    "describe_machine",
    "device_slug",
    "gpu_state",
    "load_average",
    "machine_line",
    "page_faults",
    "peak_memory",
    "resident_memory",
]

_PACKAGES = ("deepseek-arch", "torch", "triton", "transformers", "safetensors")
_VARIABLES = ("TRITON_", "DEEPSEEK_", "PTXAS_", "CUDA_VISIBLE")

# Field of nvidia-smi: name in a report, with its unit.
_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
    "clocks_event_reasons.active": "throttled",  # a mask; 0x4 is the power cap
}


def describe_machine() -> dict[str, Any]:
    """Returns the facts that a reader needs to judge a number, as JSON has them.

    "native_half_matmul" is True if the CPU multiplies 16-bit floats in hardware: operators choose their path by it. On
    a GPU machine the device, its driver and state, and the relevant environment variables are added.
    """
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_half_matmul": dispatch.native_half_matmul(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
    return facts | {name: _version(name) for name in _PACKAGES} | (_describe_gpu() if facts["gpu"] else {})


def _describe_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": (_nvidia_smi("driver_version") or [None])[0],
        "state": gpu_state(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """Returns one line for a table: the device, its kind, the threads of a CPU, and the versions.

    Args:
        facts: of `describe_machine`, or of an older report, which lacks some of them.
    """
    versions = ", ".join(f"{name} {facts[name]}" for name in _PACKAGES if facts.get(name))
    if facts["gpu"]:
        kind = f" (compute capability {facts['capability']})" if facts.get("capability") else ""
        return f"{facts['gpu']}{kind}; {versions}"
    native = facts.get("native_half_matmul")
    products = "" if native is None else f", {'native' if native else 'no native'} 16-bit products"
    return f"{facts['cpu']} ({facts['cpu_capability']}{products}), {facts['threads']} threads; {versions}"


def device_slug(facts: Mapping[str, Any]) -> str:
    """Returns the device as a part of a file name."""
    name = facts["gpu"] or f"cpu-{facts['threads']}-threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load_average() -> str:
    """Returns the mean number of processes that waited for a core in the last minute; near 0 on an idle machine."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _cpu_name() -> str:
    name = _proc_field("/proc/cpuinfo", "model name")
    return name or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------ memory


def resident_memory() -> int:
    """Returns the bytes of this process that are in memory now."""
    return _proc_bytes("/proc/self/status", "VmRSS") or _max_rss()


def peak_memory() -> int:
    """Returns the most bytes that this process has had in memory."""
    return _proc_bytes("/proc/self/status", "VmHWM") or _max_rss()


def available_memory() -> int:
    """Returns the bytes that a new process can have without swapping; 0 where the system does not say."""
    return _proc_bytes("/proc/meminfo", "MemAvailable") or 0


def page_faults() -> int:
    """Returns how many pages of memory the system has had to give this process, new ones for the most part."""
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _max_rss() -> int:
    # Only where /proc is missing: on Linux, a child inherits the `ru_maxrss` of the process that started it.
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc_bytes(path: str, field: str) -> int | None:
    """Bytes of a line such as "VmRSS:  1234 kB"."""
    value = _proc_field(path, field)
    return None if value is None else int(value.split()[0]) * 1024


def _proc_field(path: str, field: str) -> str | None:
    if not Path(path).exists():
        return None
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == field:
            return value.strip()
    return None


# ------------------------------------------------------------------ nvidia-smi


def gpu_state() -> dict[str, Any] | None:
    """Returns clocks, power and temperature of the current GPU; None where nvidia-smi does not report them."""
    values = _nvidia_smi(*_STATE)
    return None if values is None else {name: _number(v) for name, v in zip(_STATE.values(), values, strict=True)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _nvidia_smi(*fields: str) -> list[str] | None:
    """The values of these fields for the current device."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    # CUDA numbers only the visible devices; nvidia-smi numbers all devices, or takes their names.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    device = visible.split(",")[index] if visible else str(index)
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else None
