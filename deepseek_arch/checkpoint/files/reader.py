"""Reading safetensors files: checked headers, and tensor bytes straight into the memory that keeps them.

A file is 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors'
bytes back to back. Bytes are read with plain reads, not through a mapping: a mapped page counts towards the process
beside the copy that is made of it, so that a model would weigh twice its size while it loads.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.regular_file import FileIdentity, identity_of, open_regular

__all__ = ["DTYPES", "DTYPE_NAMES", "ShardError", "TensorInfo", "TensorReader", "memory_of", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A third of the limit of the safetensors library, and more than the header of the largest published model in one file:
# what is read as JSON takes ten times its size in memory.
_MAX_HEADER = 32_000_000
_MOST_DIMENSIONS = 64
_LARGEST = 2**63 - 1  # of sizes and offsets


class ShardError(ValueError):
    """A file that is not the safetensors file it should be; the message says how, not which."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Address of a tensor: `nbytes` bytes at `offset` of `file`, `dtype` in safetensors' notation.

    Attributes:
        identity: of the file when its header was read; another file in its place is not read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    identity: FileIdentity


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a safetensors file, by name.

    Raises:
        ShardError: the file is truncated, or its header is unreadable or contradicts itself or the file's size.
        OSError: the file cannot be opened, or is no regular file.
    """
    with open_regular(file) as stream:
        identity = identity_of(stream.fileno())
        size = identity.size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or (length <= _MAX_HEADER and 8 + length > size):
            raise ShardError(f"truncated: its header does not fit into the file's {size:,} bytes")
        if length > _MAX_HEADER:
            raise ShardError(f"unreadable header: expected at most {_MAX_HEADER:,} bytes of it, got {length:,}")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of more than 4300 digits
        raise ShardError(f"unreadable header: expected JSON, got {error}") from None
    if not isinstance(header, dict):
        raise ShardError(f"unreadable header: expected a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ShardError(f"unreadable header: expected __metadata__ to map names to strings, got {metadata!r:.200}")
    start = 8 + length
    infos = {name: _tensor_info(name, entry, file, start, identity) for name, entry in header.items()}
    _check_extent(infos, start, size)
    return infos


def _tensor_info(name: str, entry: Any, file: Path, start: int, identity: FileIdentity) -> TensorInfo:
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError):
        raise ShardError(
            f"unreadable header: expected dtype, shape and data_offsets of {shown}, got {entry!r:.200}"
        ) from None
    valid = isinstance(dtype, str) and len(shape) <= _MOST_DIMENSIONS
    if not valid or not all(type(n) is int and 0 <= n <= _LARGEST for n in numbers) or end < begin:
        raise ShardError(f"unreadable header: expected dtype, sizes and offsets of {shown}, got {entry!r:.200}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ShardError(
            f"unreadable header: expected {math.prod(shape) * DTYPES[dtype].itemsize:,} bytes of {shown} "
            f"({dtype} {list(shape)}), got {end - begin:,}"
        )
    return TensorInfo(name, dtype, shape, file, start + begin, end - begin, identity)


def _check_extent(infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Checks that the tensors fill the file, without gap and without overlap."""
    position = start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            raise ShardError(f"unreadable header: {info.name} does not start where the tensor before it ends")
        position += info.nbytes
    if position > size:
        raise ShardError(f"truncated: its header promises {position:,} bytes, the file has {size:,}")
    if position < size:
        raise ShardError(f"{size - position:,} bytes follow the last tensor")


def memory_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor, shared with it; valid as long as the tensor is."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class TensorReader:
    """Reads ranges of tensors; keeps the last file open and one staging buffer. A context manager.

    Attributes:
        bytes_read: tensor bytes read so far.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._file: Path | None = None
        self._stream: io.FileIO | None = None
        self._staging = torch.empty(0, dtype=torch.uint8, device="cpu")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        self._file = self._stream = None
        self._staging = torch.empty(0, dtype=torch.uint8, device="cpu")

    def read_into(self, info: TensorInfo, out: memoryview, offset: int = 0) -> None:
        """Fills `out` with the tensor's bytes from `offset` on.

        Raises:
            ShardError: the file ends early, or is no longer the one whose header was read.
        """
        if info.file != self._file:
            self.__exit__()
            self._stream, self._file = _reopen(info), info.file
        assert self._stream is not None
        self._stream.seek(info.offset + offset)
        done = 0
        while done < len(out):  # one read returns at most 2 GB
            count = self._stream.readinto(out[done:])
            if not count:
                raise ShardError(f"truncated: ended {len(out) - done:,} bytes before the end of {info.name}")
            done += count
        self.bytes_read += done

    def rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Returns rows `first` to `last` of a tensor as stored, in a staging buffer that the next call overwrites."""
        row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
        count = (last - first) * row_bytes
        if self._staging.nbytes < count:
            self._staging = torch.empty(count, dtype=torch.uint8, device="cpu")
        staged = self._staging[:count]
        self.read_into(info, memory_of(staged), first * row_bytes)
        return staged.view(DTYPES[info.dtype]).view(last - first, *info.shape[1:])


def _reopen(info: TensorInfo) -> io.FileIO:
    """Opens the file of a tensor, which must be the one whose header was read."""
    try:
        stream = open_regular(info.file)
    except FileNotFoundError:
        raise ShardError(f"{info.file.name} was removed while the checkpoint was read") from None
    if identity_of(stream.fileno()) != info.identity:
        stream.close()
        raise ShardError(f"{info.file.name} changed while the checkpoint was read")
    return stream
