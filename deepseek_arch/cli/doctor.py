"""Facts of this machine, and the implementation that each operator will use: `deepseek-arch doctor` prints them."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

import deepseek_kernels
from deepseek_kernels.common import cpu

__all__ = ["examine"]

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "safetensors", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    devices = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    return devices


def examine() -> dict[str, Any]:
    """Returns versions (None: not installed), devices, and each operator's implementation with the reason.

    `cpu_library` is "built", or why the C++ operators do not run.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "cpu_library": cpu.library_obstacle(auto=True) or "built",
        "operators": [asdict(choice) for choice in deepseek_kernels.describe()],
    }
