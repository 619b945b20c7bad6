"""Replacing the files of a checkpoint folder all at once: one writer at a time, and back if it is killed halfway.

New files are made in a hidden folder inside the checkpoint's. At the end the old ones are renamed into a folder in
that, config.json first, and the new ones into their places, config.json last. So a process that is killed in between
leaves a folder without config.json, which does not load, and everything of the old checkpoint; the next writer rolls
that back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .shards import INDEX_NAME

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CONFIG_NAME",
    "CONVERTING",
    "SAVING",
    "FolderLock",
    "old_weights",
    "read_json",
    "replacing_files",
    "swap_in",
]

CONFIG_NAME = "config.json"
SAVING = ".saving"
CONVERTING = ".converting"  # whose finished shards outlive their writer
_REPLACED = "replaced"
_JOURNAL = "swap.json"


class FolderLock:
    """The right to write to a folder, of one writer at a time; ends with the process. Makes the folder.

    A folder that an earlier writer was killed in is put in order first.

    Attributes:
        made_folder: True if the folder was not there.

    Raises:
        ValueError: another process, or another thread of this one, is writing to the folder.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made_folder = not folder.exists()
        self._descriptor = self._acquire()
        try:
            for name in (SAVING, CONVERTING):
                _roll_back(folder, folder / name)
            shutil.rmtree(folder / SAVING, ignore_errors=True)
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> int | None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return None
            try:
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # a writer that failed has removed what it had made
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(f"expected no other process to write to {str(self.folder)!r}, found one") from None
            except OSError:  # a file system without locks
                os.close(descriptor)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.folder)):
                    return descriptor
            os.close(descriptor)

    def release(self) -> None:
        """Lets other writers in; a folder that was made and is still empty goes away."""
        if self.made_folder:
            with contextlib.suppress(OSError):  # not empty: there is a checkpoint, or something to continue
                self.folder.rmdir()
        if self._descriptor is not None:
            # Closing would not do where a process that was forked meanwhile has the file open too.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def swap_in(folder: Path, staging: Path, new: Sequence[str], old: Sequence[str] = ()) -> None:
    """Renames old files of `folder` away, and `new` ones from `staging` in; undoes all of it if one rename fails.

    Args:
        new: names, or paths relative to `staging`; a config.json must be the last.
        old: names of files that go away beside those that `new` replaces.
    """
    (staging / _JOURNAL).write_text(json.dumps({"new": list(new)}), encoding="utf-8")
    aside = staging / _REPLACED
    aside.mkdir()
    first = [CONFIG_NAME] if CONFIG_NAME in new else []
    leaving = [name for name in dict.fromkeys([*first, *old, *new]) if (folder / name).is_file()]
    undo: list[tuple[Path, Path]] = []
    try:
        for name in leaving:
            _rename(folder / name, aside / name, undo)
        for name in new:
            _rename(staging / name, folder / name, undo)
    except BaseException:
        for source, target in reversed(undo):
            os.replace(target, source)
        raise


def _rename(source: Path, target: Path, undo: list[tuple[Path, Path]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    undo.append((source, target))


def _roll_back(folder: Path, staging: Path) -> None:
    """Undoes the renames of a `swap_in` that was killed.

    They begin with the old config.json and end with the new: without one the folder is in between, and with one there
    is nothing to undo. Old files are all set aside before the first new one comes, so a new file which is no longer in
    the staging folder is in its place.
    """
    aside, new = staging / _REPLACED, (read_json(staging / _JOURNAL) or {}).get("new", [])
    if not aside.is_dir():
        return
    if not (folder / CONFIG_NAME).exists():
        for name in new:
            if not (staging / name).exists() and (folder / name).is_file():
                os.replace(folder / name, staging / name)
        old = [file for file in aside.rglob("*") if file.is_file()]
        # The old config last: without it, this can be begun again.
        for file in sorted(old, key=lambda file: file == aside / CONFIG_NAME):
            os.replace(file, folder / file.relative_to(aside))
    shutil.rmtree(aside)


def old_weights(folder: Path) -> list[str]:
    """Returns the files of the checkpoint in a folder: what its index names, or the single shard."""
    try:
        shards = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()
        named = sorted({shard for shard in shards if Path(shard).name == shard})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        named = []
    return [INDEX_NAME, "model.safetensors", *named]


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yields an empty folder whose files, at the end, take the places of those in `folder` all at once.

    With a config.json among them they are a checkpoint: the weights of the one that was there go away. Without one,
    as with an adapter alone, they only replace files of their names. An error leaves everything as it was.

    Raises:
        ValueError: another process is writing to the folder.
        OSError: a file cannot be renamed.
    """
    lock = FolderLock(folder)
    staging = folder / SAVING
    try:
        staging.mkdir()
        yield staging
        new = sorted(
            (str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file()),
            key=lambda name: (name == CONFIG_NAME, name),
        )
        swap_in(folder, staging, new, old_weights(folder) if CONFIG_NAME in new else ())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def read_json(file: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, None if it is absent or broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
