"""Error texts for paths that are no checkpoint folder: they say where the files are, or how to get them."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

__all__ = ["explain_missing_config", "explain_no_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def explain_no_folder(source: str | PathLike[str]) -> str:
    """Returns what to do about a path that is no folder: a single file, or the name of a model on the Hub."""
    path = Path(source)
    if path.is_file():
        return f"; give the folder with the config.json and the safetensors of this file: {str(path.parent)!r}"
    if _HUB_ID.fullmatch(str(source)) and not path.parent.exists():
        return f"; nothing is downloaded by itself: hf download {source} --local-dir {path.name}, then {path.name!r}"
    return ""


def explain_missing_config(folder: Path) -> str:
    """Returns the error of a folder without a readable config.json, with the places where one was found."""
    message = f"expected a checkpoint folder with a config.json, got {str(folder)!r} without one"
    if (folder / "config.json").exists():
        return (
            f"expected a checkpoint folder with a config.json, got {str(folder)!r} whose config.json is no regular file"
        )
    replaced = sorted(folder.glob(".*/replaced/config.json"))
    if replaced:
        return (
            f"{message}: a process is replacing its files, or was killed while it did. The files from before are in "
            f"{str(replaced[0].parent)!r}; the next save or conversion to this folder puts them back first"
        )
    if any(file.is_dir() for file in (folder / ".saving", folder / ".converting")):
        return f"{message}: a process is writing to it, or was killed while it did; save or convert again"
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        return f"{message}; the checkpoint of this cache is {str(snapshots[-1].parent)!r}"
    return message
