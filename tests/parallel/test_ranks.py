"""Ranks of the tests themselves."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from support.ranks import RankError, run_ranks


def late(rank):
    """Rank 0 has answered long before rank 1 needs it."""
    numbers = [None, None]
    dist.all_gather_object(numbers, os.getpid())
    if rank == 1:
        time.sleep(0.3)
        os.kill(numbers[0], 0)  # raises if it has left
    return rank


def test_a_rank_stays_until_the_others_have_answered():
    assert run_ranks(late, 2) == [0, 1]


def killed(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_no_rank_stays_for_one_that_has_died():
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1: no answer"):
        run_ranks(killed, 2)
    assert time.monotonic() - started < 60
