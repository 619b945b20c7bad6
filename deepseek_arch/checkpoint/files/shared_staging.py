"""Staging folder of a checkpoint that several ranks write, replaced all at once or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...parallel.agreement import on_ranks, raise_alike
from .staging import SAVING, FolderLock, discard, swap_in
from .writer import check_room

__all__ = ["SharedStaging"]

_Names = Callable[[], Sequence[str]]


class SharedStaging:
    """Hidden folder inside a checkpoint's into which every rank writes files of its own; the first rank commits them.

    A context manager that all ranks enter, with the rules of `CheckpointWriter`: the first rank holds the folder's
    lock, puts in order what a killed writer has left, and swaps old and new files at the end. A rank that is killed
    leaves the old files as they are; the others raise when their next collective fails.

    Within the context errors of one rank must be raised by `raise_alike`, so that no other waits for it.

    Args:
        folder: of the checkpoint, which all ranks see.
        nbytes: of all ranks together, for which there must be room.

    Attributes:
        path: where the ranks write. It has a name of its own each time, so that ranks whose first one was killed
            never write among the files of a later writer.

    Raises:
        ValueError: another process is writing to the folder, or not all ranks see it.
        OSError: the folder cannot be made, or the disk has no room.
    """

    def __init__(self, folder: str | Path, nbytes: int = 0) -> None:
        self.folder = Path(folder)
        self.first = not on_ranks() or torch.distributed.get_rank() == 0
        self._staging = self.folder / SAVING
        self._nbytes = nbytes
        self._lock: FolderLock | None = None
        self.path = self._staging

    def __enter__(self) -> SharedStaging:
        try:
            self._agreed(self._start)
            name: list[Any] = [uuid.uuid4().hex if self.first else None]
            if on_ranks():
                torch.distributed.broadcast_object_list(name)
            self.path = self._staging / name[0]
            self._agreed(self.path.mkdir)
            missing = not self.path.is_dir()
            where = f"expected all ranks to see the folder {str(self.folder)!r}, got one that does not"
            raise_alike(ValueError(where) if missing else None)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"expected a folder to write to, got the file {str(self.folder)!r}")
        self._lock = FolderLock(self.folder)
        self._staging.mkdir()
        check_room(self._staging, self._nbytes)

    def _agreed(self, action: Callable[[], object]) -> None:
        """Runs `action` on the first rank, and raises its error on all."""
        error = None
        if self.first:
            try:
                action()
            except Exception as raised:  # whatever it is: the others must not wait for this rank (TRAPS S4)
                error = raised
        raise_alike(error)

    def commit(self, new: _Names, old: Callable[[Path], Sequence[str]] = lambda folder: ()) -> None:
        """Puts files of `path` into their places; every rank calls this when its own are complete and on the disk.

        Args:
            new: called on the first rank; returns the files' names, a config.json the last.
            old: function of the folder: names of files there that go away beside those that are replaced.
        """

        def swap() -> None:
            names = new()
            for name in names:
                os.replace(self.path / name, self._staging / name)
            swap_in(self.folder, self._staging, names, old(self.folder))

        self._agreed(swap)

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            try:
                discard(self.folder, self._staging)
            finally:
                self._lock.release()
