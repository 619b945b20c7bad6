"""Errors and decisions that all ranks share, so that none waits for one that has stopped (TRAPS S4)."""

from __future__ import annotations

import pickle
from typing import Any

import torch

__all__ = ["agreed_any", "on_ranks", "raise_alike"]


def on_ranks() -> bool:
    """Returns True where a process group runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def raise_alike(error: Exception | None, group: Any = None) -> None:
    """Raises on every rank what went wrong on the first one that has an error; every rank of `group` calls this.

    Without a process group `error` itself is raised, if there is one.

    Raises:
        ValueError, OSError: of the same class with the same message on all ranks.
        RuntimeError: an error of another kind happened elsewhere; a rank that has one of its own raises that.
    """
    if not on_ranks():
        if error is not None:
            raise error
        return
    portable = None if error is None else _portable(error)
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, portable, group=group)
    first = next((rank for rank, each in enumerate(gathered) if each is not None), None)
    if first is None:
        return
    if error is not None and (
        first == torch.distributed.get_rank(group) or not isinstance(error, ValueError | OSError)
    ):
        raise error
    raise gathered[first] from None


def _portable(error: Exception) -> Exception:
    """Returns an error that other processes can raise: the same, where pickle carries it over."""
    if not isinstance(error, ValueError | OSError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of someone else's raises
        return ValueError(str(error))
    return copied


def agreed_any(value: bool) -> bool:
    """Returns True if `value` is true on any rank; every rank calls this."""
    if not on_ranks():
        return value
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return any(gathered)
