"""Facts about shapes, tensors and devices that a launch needs. Asking takes neither Triton nor a GPU.

In the interpreter, which runs kernels on a CPU, a device answers as a Hopper GPU with two multiprocessors: a program
then takes several tiles, and programs wait for each other, as on a real one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = [
    "ENOUGH_PROGRAMS",
    "capability",
    "cdiv",
    "family",
    "hopper",
    "power_of_two",
    "processors",
    "rows_readable",
]

ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


def power_of_two(number: int) -> int:
    """Returns the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def rows_readable(x: Tensor) -> Tensor:
    """Returns x as the kernels read it, neighbours of the last dimension side by side: copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the CUDA compute capability, or None for an AMD GPU."""
    if device.type != "cuda":
        return 9, 0
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def family(device: torch.device) -> str:
    """Returns the compile gate's target whose configurations run on this device."""
    version = capability(device)
    if version is None:
        return "gfx942"
    # 12: a Blackwell without tensor memory, and with less shared memory than any before it.
    return {9: "sm_90", 10: "sm_100"}.get(version[0], "sm_80")


def hopper(device: torch.device) -> bool:
    """Tells if warp-specialized kernels, which are made for Hopper's warp groups, run on this device."""
    return family(device) == "sm_90"


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
