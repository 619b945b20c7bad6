"""A progress bar for long reads and writes."""

from __future__ import annotations

from tqdm import tqdm

__all__ = ["progress"]


def progress(description: str, total_bytes: int) -> tqdm:
    """Returns a bar to `update` with bytes: a context manager that shows only on a terminal, after two seconds."""
    # disable=None: off unless stderr is a terminal.
    return tqdm(desc=description, total=total_bytes, unit="B", unit_scale=True, delay=2, leave=False, disable=None)
