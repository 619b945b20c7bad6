"""Huge pages for the weights of a model in a CPU's memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.argument_types import check_types

__all__ = ["use_huge_pages"]

_HUGE_PAGE = 2 * 1024 * 1024  # of x86-64, and of AArch64 with pages of 4 KiB
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@check_types
@torch.no_grad()
def use_huge_pages(module: nn.Module) -> int:
    """Moves a module's large CPU tensors into huge pages of Linux, from which a CPU decodes faster.

    A decoded token reads each weight once. With pages of 4 KiB a core waits for page tables as much as for weights,
    and most systems give huge pages only to memory that asks for them before it is first written. Call this once,
    after loading and before a long generation. It needs the memory of the largest tensor once more and the time of a
    copy; a virtual machine whose host takes free memory back needs several times that, which is why loading does not
    do it by itself. Any module will do, also one of transformers.

    Args:
        module: any module. Parameters stay the same objects, so that optimizers keep them, and what shares memory
            still does. Only views that others took of the tensors before keep the old memory. Tensors below 4 MiB, on
            other devices, and of special kinds (distributed, quantized by others) stay where they are.

    Returns:
        The bytes moved. Zero where the system has no huge pages to give.
    """
    if not _available():
        return 0
    moved: dict[int, torch.UntypedStorage] = {}
    # Each tensor once, also a parameter that is registered as a buffer too: by then its memory is new, and may lie
    # where that of another one was.
    for tensor in dict.fromkeys((*module.parameters(), *module.buffers())):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
            continue
        old = tensor.untyped_storage()
        if old.nbytes() < 2 * _HUGE_PAGE:  # less may hold no whole page
            continue
        if old.data_ptr() not in moved:
            # Not `torch.empty`, which deterministic algorithms make fill the memory.
            new = moved[old.data_ptr()] = torch.UntypedStorage(old.nbytes(), device="cpu")
            _advise(new)
            new.copy_(old)
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        tensor.data = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(moved[old.data_ptr()], *place)
    return sum(storage.nbytes() for storage in moved.values())


def _available() -> bool:
    """Returns whether the system gives huge pages to memory that asks for them."""
    try:
        return sys.platform == "linux" and "[never]" not in _SETTING.read_text()
    except OSError:  # a kernel without them
        return False


def _advise(memory: torch.UntypedStorage) -> None:
    """Asks for huge pages inside untouched memory. A refusal leaves small pages, which hold the same values."""
    first = -(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (memory.data_ptr() + memory.nbytes()) // _HUGE_PAGE * _HUGE_PAGE
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
