"""Writing checkpoint folders: shards planned beforehand, streamed tensor by tensor, put in place at the end."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from torch import Tensor

from ...layout.published_tensors import TensorSpec
from .reader import DTYPE_NAMES, memory_of
from .shards import INDEX_NAME
from .staging import CONFIG_NAME, SAVING, FolderLock, discard, old_weights, swap_in

__all__ = [
    "CheckpointWriter",
    "ShardFiles",
    "check_room",
    "parse_size",
    "plan_shards",
    "shard_names",
    "write_descriptions",
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """Returns the bytes of "5GB", "200 MB", "1.5GiB" or a plain number; GB is 10^9, GiB 2^30.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not isinstance(size, int | str) or isinstance(size, bool) or match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"expected a size like '5GB', '200MB' or a number of bytes, got {size!r:.200}")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= count < 2**63:
        raise ValueError(f"expected a size of at least one byte and less than 2^63, got {size!r:.200}")
    return int(count)


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_bytes: int) -> list[list[TensorSpec]]:
    """Fills shards in order; a group stays together, and one larger than `max_bytes` gets a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Returns transformers' file names: model.safetensors, or model-00001-of-00003.safetensors and so on."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class ShardFiles:
    """Shards that are written tensor by tensor into a folder, their headers first.

    Args:
        folder: where the files are made, by `start_shards`.
        shards: the tensors of each shard, in the order of `names`.

    Attributes:
        nbytes: bytes of all tensors.
    """

    def __init__(self, folder: Path, shards: Sequence[Sequence[TensorSpec]], names: Sequence[str]) -> None:
        self.names = list(names)
        self._staging = folder
        self._shards = shards
        self._places: dict[str, tuple[str, int, TensorSpec]] = {}  # tensor -> shard, offset in it
        self._unwritten = {spec.name for shard in shards for spec in shard}
        self.nbytes = sum(spec.nbytes for shard in shards for spec in shard)
        self._current: str | None = None
        self._stream: BinaryIO | None = None

    @property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor."""
        return {spec.name: name for name, specs in zip(self.names, self._shards, strict=True) for spec in specs}

    def start_shards(self) -> None:
        """Writes the header of every shard."""
        for name, specs in zip(self.names, self._shards, strict=True):
            self._start_shard(name, specs)

    def _start_shard(self, name: str, specs: Sequence[TensorSpec]) -> None:
        """Writes the header. Wide dtypes come first: their readers need them aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in sorted(specs, key=lambda spec: -spec.itemsize):
            end = position + spec.nbytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
            self._places[spec.name] = (name, position, spec)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for spec in specs:
            shard, offset, _ = self._places[spec.name]
            self._places[spec.name] = (shard, start + offset, spec)
        with (self._staging / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor, first_byte: int = 0) -> None:
        """Writes a tensor, or from `first_byte` on a part of it (then the parts must come in order)."""
        shard, offset, spec = self._places[name]
        data = tensor.detach().cpu().contiguous()
        if DTYPE_NAMES.get(data.dtype) != spec.dtype or first_byte + data.nbytes > spec.nbytes:
            raise ValueError(
                f"expected {spec.dtype} {list(spec.shape)} for {name}, got {data.dtype} {list(data.shape)}"
            )
        if shard != self._current:
            self._close()
            self._stream, self._current = (self._staging / shard).open("r+b", buffering=0), shard
        assert self._stream is not None
        self._stream.seek(offset + first_byte)
        memory, done = memory_of(data), 0
        while done < len(memory):  # one write takes at most 2 GB
            done += self._stream.write(memory[done:]) or 0
        if first_byte + data.nbytes == spec.nbytes:
            self._unwritten.discard(name)

    def _close(self) -> None:
        if self._stream is not None:
            os.fsync(self._stream.fileno())  # the renames of `commit` must not outrun the bytes in a power cut
            self._stream.close()
        self._stream = self._current = None

    def complete(self) -> None:
        """Sees that every tensor was written and lies on the disk."""
        assert not self._unwritten, f"never written: {sorted(self._unwritten)[:3]}"
        self._close()

    def abandon(self) -> None:
        """Closes what is open."""
        if self._stream is not None:
            self._stream.close()


class CheckpointWriter(ShardFiles):
    """Writes a checkpoint folder that appears whole or not at all.

    A context manager. `write` every tensor of `shards`, in any order, then `commit`. Files are made in a hidden folder
    inside `folder` and renamed into place by `commit`, after the files of the checkpoint that was there have been set
    aside; leaving the context without `commit`, or an error within it, restores everything as it was. Files that are no
    part of a checkpoint's weights (a tokenizer, a README) are left alone. The next writer puts in order what a process
    leaves that is killed (see `staging`).

    Args:
        shards: the tensors of each shard.
        names: the shards' file names; default transformers'.

    Raises:
        ValueError: another process is writing to the folder.
        OSError: the disk has no room for it, or a write failed.
    """

    def __init__(self, folder: str | Path, shards: Sequence[Sequence[TensorSpec]], names: Sequence[str] | None = None):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"expected a folder to write to, got the file {str(folder)!r}")
        super().__init__(self.folder / SAVING, shards, names or shard_names(len(shards)))
        self._lock: FolderLock | None = None

    def __enter__(self) -> CheckpointWriter:
        self._lock = FolderLock(self.folder)
        try:
            self._staging.mkdir()
            check_room(self._staging, self.nbytes)
            self.start_shards()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.abandon()
            discard(self.folder, self._staging)
        finally:
            if self._lock is not None:
                self._lock.release()

    def commit(
        self,
        config: dict[str, Any],
        companions: Iterable[Path] = (),
        more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> list[Path]:
        """Puts the shards, their index and config.json in place, and copies of `companions` that are not there yet.

        Args:
            more: content of further JSON files, by name.

        Returns:
            The files written.
        """
        self.complete()
        described = write_descriptions(self._staging, self.weight_map, self.nbytes, config, more)
        new = [*self.names, *described]
        for file in companions:
            if not (self.folder / file.name).exists():
                shutil.copyfile(file, self._staging / file.name)
                new.append(file.name)
        swap_in(self.folder, self._staging, [*new, CONFIG_NAME], old_weights(self.folder))
        return [self.folder / name for name in [*new, CONFIG_NAME]]


def check_room(folder: Path, nbytes: int) -> None:
    """Raises OSError if the disk of `folder` has less than `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        detail = f"{os.strerror(errno.ENOSPC)}: {nbytes:,} bytes to write, {free:,} free"
        raise OSError(errno.ENOSPC, detail, str(folder.parent))


def write_descriptions(
    folder: Path,
    weight_map: Mapping[str, str],
    nbytes: int,
    config: dict[str, Any],
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> list[str]:
    """Writes the index of shards, config.json and further JSON files; returns their names but for config.json's."""
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)})
    _write_json(folder / CONFIG_NAME, config)
    for name, content in more.items():
        _write_json(folder / name, content)
    return [INDEX_NAME, *more]


def _write_json(file: Path, data: dict[str, Any]) -> None:
    """Writes a JSON file, and waits until it is on the disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(data, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
