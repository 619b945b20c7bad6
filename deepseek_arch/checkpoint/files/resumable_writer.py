"""A checkpoint folder written shard by shard, which survives being killed and goes on after the last whole shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...layout.published_tensors import TensorSpec
from .reader import memory_of
from .staging import CONVERTING, FolderLock, discard, read_json
from .writer import CheckpointWriter, check_room

__all__ = ["ResumableWriter", "finished_shards"]

_MANIFEST = "manifest.json"
_PARTIAL = ".partial"
# Of one write. Larger ones get larger pages, which on a virtual machine are likely to be fresh from the host: measured
# seven times slower from 1 MB on.
_WRITE_BYTES = 256 * 2**10
_SYNC_BYTES = 256 * 2**20  # are on their way to the disk while the next ones are made


class ResumableWriter(CheckpointWriter):
    """A `CheckpointWriter` whose finished shards outlive it.

    Call `start` for a shard, `put` for every byte of its tensors, in any order and from any thread, then `finish`; at
    the end `settle`, and `commit` when `unfinished` is empty. Shards are written to a hidden folder inside `folder`,
    each under another name until it is complete and on the disk. A manifest beside them says what they are; a later
    writer with the same manifest starts with the shards that were finished.

    Leaving the context without `commit` keeps them, unless there are none: then everything is as it was before.

    Args:
        manifest: what the shards are made from and how, as JSON can hold it; "shards" are their names.
        resume: continue what an earlier writer left; False throws it away.

    Raises:
        ValueError: what an earlier writer left has another manifest, or another process is writing to it.
        OSError: the disk has no room for what is left to write, or a write failed.
    """

    def __init__(
        self,
        folder: str | Path,
        shards: Sequence[Sequence[TensorSpec]],
        manifest: dict[str, Any],
        resume: bool = True,
    ) -> None:
        super().__init__(folder, shards)
        self._manifest = manifest
        self._resume = resume
        self._specs = dict(zip(self.names, shards, strict=True))
        self._staging = self.folder / CONVERTING
        self._is_ours = self._committed = False
        self._disk = ThreadPoolExecutor(1)  # waits for the disk while others convert
        self._syncs: list[Future[None]] = []
        self._unsynced = 0

    def __enter__(self) -> ResumableWriter:
        try:
            self._lock = FolderLock(self.folder)
            self._staging.mkdir(exist_ok=True)
            self._open_staging()
            self._check_room()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.shutdown()  # a shard that is whole is finished, whatever happened to the one after it
        try:
            if self._is_ours:
                for file in self._staging.glob(f"*{_PARTIAL}"):
                    file.unlink(missing_ok=True)
                if self._committed or len(self.unfinished) == len(self.names):
                    discard(self.folder, self._staging)
        finally:
            if self._lock is not None:
                self._lock.release()

    @property
    def unfinished(self) -> list[str]:
        """Names of the shards that are still to be written."""
        return [name for name in self.names if self._is_unfinished(name)]

    def _is_unfinished(self, name: str) -> bool:
        return any(spec.name in self._unwritten for spec in self._specs[name])

    # ---------------------------------------------------------------- starting

    def _open_staging(self) -> None:
        file = self._staging / _MANIFEST
        earlier = read_json(file)
        if earlier is not None and self._resume and earlier != self._manifest:
            differing = [key for key in self._manifest if earlier.get(key) != self._manifest[key]]
            raise ValueError(
                f"expected to continue what was begun in {str(self._staging)!r}, but it has another "
                f"{', another '.join(differing) or 'content'}; resume=False (--no-resume) throws it away and starts "
                "afresh"
            )
        self._is_ours = True
        if earlier is None or not self._resume:
            for old in self._staging.iterdir():
                old.unlink()
            new = file.with_suffix(".new")
            new.write_text(json.dumps(self._manifest), encoding="utf-8")
            os.replace(new, file)
        for name in finished_shards(self.folder, self._manifest):
            self._discard(name)

    def _check_room(self) -> None:
        check_room(self._staging, sum(spec.nbytes for name in self.unfinished for spec in self._specs[name]))

    def _discard(self, name: str) -> None:
        self._unwritten -= {spec.name for spec in self._specs[name]}

    # ---------------------------------------------------------------- writing

    def start(self, name: str) -> None:
        """Begins a shard with its header."""
        self._start_shard(name + _PARTIAL, self._specs[name])

    def put(self, name: str, tensor: Tensor, first_byte: int) -> None:
        """Writes the bytes of `tensor`, contiguous and on the CPU, into the tensor `name` from `first_byte` on."""
        shard, offset, spec = self._places[name]
        assert first_byte + tensor.nbytes <= spec.nbytes, name
        memory, done = memory_of(tensor), 0
        with (self._staging / shard).open("r+b", buffering=0) as stream:
            stream.seek(offset + first_byte)
            while done < len(memory):
                done += stream.write(memory[done : done + _WRITE_BYTES]) or 0
        self._unsynced += done  # about: threads may overwrite each other's sum
        if self._unsynced >= _SYNC_BYTES and all(sync.done() for sync in self._syncs):
            self._unsynced = 0
            self._syncs.append(self._disk.submit(self._sync, self._staging / shard))

    def finish(self, name: str) -> None:
        """Lets a shard go to the disk and, when it is there, take its name: from then on it is there whatever happens.

        Returns before that, but not before the same is true of the shard before.
        """
        self.settle()
        self._syncs.append(self._disk.submit(self._finish, name))

    def settle(self) -> None:
        """Waits until what is finished is on the disk.

        Raises:
            OSError: it does not get there.
        """
        while self._syncs:
            self._syncs.pop(0).result()

    def _sync(self, file: Path) -> None:
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())

    def _finish(self, name: str) -> None:
        partial = self._staging / (name + _PARTIAL)
        self._sync(partial)
        os.replace(partial, self._staging / name)
        self._discard(name)

    # ---------------------------------------------------------------- reading back

    def is_sound(self, name: str) -> bool:
        """Returns True if a finished shard has the right header and length; then `get` can read it."""
        self.start(name)
        partial, file = self._staging / (name + _PARTIAL), self._staging / name
        header = partial.read_bytes()
        partial.unlink()
        with file.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):  # from the disk, not from what the system remembers of writing it
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            same = stream.read(len(header)) == header
        return same and file.stat().st_size == len(header) + sum(spec.nbytes for spec in self._specs[name])

    def get(self, name: str, nbytes: int, first_byte: int) -> Tensor:
        """[nbytes] uint8 of the tensor `name`, in a finished shard, from `first_byte` on."""
        shard, offset, _ = self._places[name]
        read = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        memory, done = memory_of(read), 0
        with (self._staging / shard.removesuffix(_PARTIAL)).open("rb", buffering=0) as stream:
            stream.seek(offset + first_byte)
            while done < nbytes and (count := stream.readinto(memory[done:])):
                done += count
        return read[:done]

    def reject(self, name: str) -> None:
        """Deletes a finished shard, so that a later writer writes it anew."""
        (self._staging / name).unlink()
        self._unwritten |= {spec.name for spec in self._specs[name]}

    def commit(
        self,
        config: dict[str, Any],
        companions: Iterable[Path] = (),
        more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> list[Path]:
        self.settle()
        files = super().commit(config, companions, more)
        self._committed = True
        return files


def finished_shards(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Returns the names of the shards that a conversion with this manifest has left in `folder` to continue from."""
    staging = folder / CONVERTING
    if read_json(staging / _MANIFEST) != manifest:
        return []
    return [name for name in manifest["shards"] if (staging / name).is_file()]
