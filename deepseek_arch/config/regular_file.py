"""Regular files, opened without waiting, and those of a folder pinned: the same from first look to last, or known."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileIdentity", "PinnedFiles", "identity_of", "open_regular"]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class FileIdentity(NamedTuple):
    """Properties of a file of which one differs after it was replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def identity_of(file: str | os.PathLike[str] | int) -> FileIdentity:
    """Returns the identity of the file at a path or behind a descriptor.

    Raises:
        OSError: there is none.
    """
    status = os.stat(file)
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a regular file for reading, unbuffered; to open anything else may wait for ever, or have effects.

    Raises:
        OSError: the file cannot be opened, or it is a folder, a FIFO, a socket or a device.
    """
    _check_regular(os.stat(path).st_mode, path)
    # A FIFO may take the place of the file before it is opened: opening that would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor, "rb")


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for matches, name in _KINDS if matches(mode)), "something else")
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind}", str(path))


class PinnedFiles:
    """Identities of the files of a folder as they were first seen, absent ones included.

    A checkpoint is read file by file, and another process may replace it meanwhile. Whatever was read belongs together
    if at the end every file is still the one that was read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, FileIdentity | None] = {}

    def read(self, name: str, most: int) -> bytes | None:
        """Returns the content of a file and pins it; None if it is absent.

        Raises:
            ValueError: the file has more than `most` bytes.
            OSError: it cannot be read, or is no regular file.
        """
        try:
            stream = open_regular(self.folder / name)
        except FileNotFoundError:
            self._seen.setdefault(name, None)
            return None
        with stream:
            identity = identity_of(stream.fileno())
            self.pin(name, identity)
            if identity.size > most:
                raise ValueError(f"expected JSON of at most {most:,} bytes, got {identity.size:,}")
            return stream.readall()

    def pin(self, name: str, identity: FileIdentity) -> None:
        """Notes the identity of a file that was opened."""
        self._seen.setdefault(name, identity)

    def look_at(self, name: str) -> None:
        """Pins a file as it is now, or its absence."""
        self._seen.setdefault(name, self._now(name))

    def changed(self) -> list[str]:
        """Returns the files that are not, or no longer, what they were when they were pinned."""
        return [name for name, identity in self._seen.items() if self._now(name) != identity]

    def _now(self, name: str) -> FileIdentity | None:
        try:
            return identity_of(self.folder / name)
        except OSError:
            return None
