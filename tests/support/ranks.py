"""Runs a function on several ranks: processes forked from the test's own, so that nothing is imported again."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # imported before the fork, like the two below: once for all ranks
import torch.distributed.fsdp
import torch.distributed.tensor

__all__ = ["RankError", "run_ranks"]

COLLECTIVE_SECONDS = 60


class RankError(AssertionError):
    """Errors of ranks, with what each of them raised."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, seconds: float = 120) -> list[Any]:
    """Runs `function(rank, *args)` on `world` gloo ranks and returns the results by rank.

    Args:
        function: returns something that pickle can write; closures are fine.
        seconds: after which ranks that still run are killed.

    Raises:
        RankError: a rank raised, died or was killed; the message has every rank's traceback.
    """
    with tempfile.TemporaryDirectory(prefix="ranks") as name:
        folder = Path(name)
        running = {_forked(function, rank, world, args, folder): rank for rank in range(world)}
        deadline = time.monotonic() + seconds
        while running and time.monotonic() < deadline:
            running = {pid: rank for pid, rank in running.items() if not os.waitpid(pid, os.WNOHANG)[0]}
            if all((folder / f"{rank}.pickle").exists() for rank in running.values()):
                (folder / "done").touch()
            time.sleep(0.01)
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        outcomes = [_outcome(folder, rank) for rank in range(world)]
    problems = [f"rank {rank}: {value}" for rank, (succeeded, value) in enumerate(outcomes) if not succeeded]
    if problems:
        raise RankError("\n".join(problems))
    return [value for _, value in outcomes]


def _forked(function: Callable[..., Any], rank: int, world: int, args: tuple[Any, ...], folder: Path) -> int:
    """Starts one rank and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
        torch.set_num_threads(1)
        meeting = f"file://{folder}/meeting"
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
        succeeded, outcome = True, pickle.dumps((True, function(rank, *args)))
    except BaseException:
        succeeded, outcome = False, pickle.dumps((False, traceback.format_exc()))
    (folder / f"{rank}.part").write_bytes(outcome)
    (folder / f"{rank}.part").rename(folder / f"{rank}.pickle")
    parent = os.getppid()
    # A rank that leaves closes its connections, of which another may just be making one. The others of a rank that has
    # failed are to see that.
    while succeeded and folder.exists() and not (folder / "done").exists() and os.getppid() == parent:
        time.sleep(0.01)
    os._exit(0)  # without the clean-up of pytest, which is the parent's


def _outcome(folder: Path, rank: int) -> tuple[bool, Any]:
    path = folder / f"{rank}.pickle"
    return pickle.loads(path.read_bytes()) if path.exists() else (False, "no answer: it was killed or died")
