"""Replacing the files of a checkpoint folder all at once: one writer at a time, and back if it is killed halfway.

New files are made in a hidden folder inside the checkpoint's. At the end the old ones are renamed into a folder in
that, config.json first, and the new ones into their places, config.json last. So a process that is killed in between
leaves a folder without config.json, which does not load, and everything of the old checkpoint; the next writer rolls
that back. A journal of the renames lies beside them; it takes another name once they are all done, and only then may
old files be deleted.
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
    "discard",
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
_FINISHED = "swapped.json"  # the journal, once every rename is done


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
            _roll_back(folder, folder / CONVERTING)
            discard(folder, folder / SAVING)
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
    aside = staging / _REPLACED
    aside.mkdir()
    first = [CONFIG_NAME] if CONFIG_NAME in new else []
    leaving = [name for name in dict.fromkeys([*first, *old, *new]) if (folder / name).is_file()]
    with (staging / _JOURNAL).open("w", encoding="utf-8") as journal:
        json.dump({"new": list(new), "leaving": leaving}, journal)
        journal.flush()
        os.fsync(journal.fileno())
    try:
        for source, target in _renames(folder, staging, new, leaving):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        os.replace(staging / _JOURNAL, staging / _FINISHED)
    except BaseException:
        _roll_back(folder, staging)
        raise


def _renames(folder: Path, staging: Path, new: Sequence[str], leaving: Sequence[str]) -> list[tuple[Path, Path]]:
    """Returns the sources and targets of a swap, in its order: all old files leave before the first new one comes."""
    aside = staging / _REPLACED
    return [(folder / name, aside / name) for name in leaving] + [(staging / name, folder / name) for name in new]


def _roll_back(folder: Path, staging: Path) -> None:
    """Undoes the renames of a `swap_in` that did not finish; deletes the old files of one that did.

    Where it stopped is seen from the files: a rename is done if its target is there and its source is not. So this can
    itself be interrupted and begun again, until the journal goes. Without a readable journal, old files return to the
    places that are empty.

    Raises:
        OSError: a file cannot be renamed; it, and those that are still to be renamed, are where they were.
    """
    aside, journal, finished = staging / _REPLACED, staging / _JOURNAL, staging / _FINISHED
    if journal.exists() or not finished.exists():
        # The old config last: without it, the folder does not load.
        found = sorted(aside.rglob("*"), key=lambda file: (file != aside / CONFIG_NAME, file))
        names = [str(file.relative_to(aside)) for file in found if file.is_symlink() or not file.is_dir()]
        swap = _read_journal(journal) or {"new": [], "leaving": names}
        for source, target in reversed(_renames(folder, staging, swap["new"], swap["leaving"])):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        # Before any file of the staging folder goes, or its absence would pass for a rename that is to be undone.
        journal.unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    if not aside.exists():
        finished.unlink(missing_ok=True)


def _read_journal(file: Path) -> dict[str, list[str]] | None:
    """Returns the names in a journal; None if it is absent, broken, or names a file outside of the folder.

    A folder may come from anywhere, and so may the journal in it.
    """
    swap = read_json(file) or {}
    lists: list[Any] = [swap.get("new"), swap.get("leaving")]
    if not all(isinstance(names, list) and all(map(_is_inside, names)) for names in lists):
        return None
    return {"new": lists[0], "leaving": lists[1]}


def _is_inside(name: object) -> bool:
    """Returns True for a path relative to a folder that does not lead out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def discard(folder: Path, staging: Path) -> None:
    """Deletes a staging folder, with no file of the checkpoint in it: a swap that did not finish is undone first.

    If that fails, it stays for the next writer.

    Raises:
        OSError: a file of the old checkpoint cannot be put back.
    """
    _roll_back(folder, staging)
    if not (staging / _REPLACED).exists():
        shutil.rmtree(staging, ignore_errors=True)


def old_weights(folder: Path, variant: str | None = None) -> list[str]:
    """Returns the files of the checkpoint in a folder: what its index names, or the single shard.

    Args:
        variant: of transformers' file names, as in model.fp16.safetensors; only files of that variant are returned.
    """
    infix = "" if variant is None else f".{variant}"
    index = f"{INDEX_NAME.removesuffix('.json')}{infix}.json"
    try:
        shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        named = sorted({shard for shard in shards if Path(shard).name == shard})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        named = []
    if variant is not None:
        named = [shard for shard in named if shard.startswith(f"model{infix}-")]
    return [index, f"model{infix}.safetensors", *named]


@contextlib.contextmanager
def replacing_files(folder: Path, variant: str | None = None) -> Iterator[Path]:
    """Yields an empty folder whose files, at the end, take the places of those in `folder` all at once.

    With a config.json among them they are a checkpoint: the weights of the one that was there go away. Without one,
    as with an adapter alone, they only replace files of their names. An error leaves everything as it was.

    Args:
        variant: of the weights, by transformers' file names; those of other variants, and of none, stay.

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
        swap_in(folder, staging, new, old_weights(folder, variant) if CONFIG_NAME in new else ())
    finally:
        try:
            discard(folder, staging)
        finally:
            lock.release()


def read_json(file: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, None if it is absent or broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
