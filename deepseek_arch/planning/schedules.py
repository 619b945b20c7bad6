"""Orders of operations of pipeline schedules, one list a rank, and which stages a rank holds.

An operation is a group of one part, or of a forward and a backward part that run beside each other. Parts: F forward;
B whole backward; I and W its halves, gradients of inputs and of weights (Qi et al., arXiv 2401.10241).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "SCHEDULES",
    "Operation",
    "Part",
    "check_schedule",
    "operation_counts",
    "rank_stages",
    "schedule_operations",
    "stage_count",
]

SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "zbv", "dualpipe", "dualpipev")


class Part(NamedTuple):
    """One stage's work on one micro-batch; `kind` is F, B, I or W."""

    kind: str
    stage: int
    micro: int


Operation = tuple[Part, ...]


def stage_count(schedule: str, pp: int, chunks: int = 1) -> int:
    """Returns the number of stages that the layers are cut into."""
    return pp * {"interleaved": chunks, "zero_bubble": chunks, "zbv": 2, "dualpipev": 2}.get(schedule, 1)


def rank_stages(schedule: str, pp: int, rank: int, chunks: int = 1) -> tuple[int, ...]:
    """Returns the stages that `rank` holds, first the one nearest the input.

    V-shaped schedules fold 2 pp stages at the last rank; DualPipe runs each of pp stages on two ranks, so that
    micro-batches enter at both ends.
    """
    if schedule in ("zbv", "dualpipev"):
        return rank, 2 * pp - 1 - rank
    if schedule == "dualpipe":
        return rank, pp - 1 - rank
    return tuple(rank + chunk * pp for chunk in range(stage_count(schedule, pp, chunks) // pp))


def check_schedule(schedule: str, pp: int, micro_batches: int, chunks: int = 1) -> None:
    """Checks what a schedule needs of its number of micro-batches.

    Raises:
        ValueError: an unknown schedule, or a number it cannot run with.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"expected a schedule of {', '.join(SCHEDULES)}, got {schedule!r}")
    if micro_batches < 1:
        raise ValueError(f"expected at least one micro-batch, got {micro_batches}")
    if schedule == "interleaved" and chunks < 2:
        raise ValueError(f"expected at least 2 chunks a rank for the interleaved schedule, got {chunks}")
    if schedule in ("interleaved", "zero_bubble") and chunks > 1 and micro_batches % pp:
        raise ValueError(f"expected micro-batches in multiples of pp = {pp} for {schedule}, got {micro_batches}")
    if schedule in ("dualpipe", "dualpipev"):
        if micro_batches < 2 * pp:
            raise ValueError(f"expected at least 2 pp = {2 * pp} micro-batches for {schedule}, got {micro_batches}")
        if schedule == "dualpipe" and (pp % 2 or micro_batches % 2):
            raise ValueError(f"expected even pp and micro-batches for dualpipe, got {pp} and {micro_batches}")


@lru_cache(maxsize=32)
def schedule_operations(
    schedule: str, pp: int, micro_batches: int, chunks: int = 1
) -> tuple[tuple[Operation, ...], ...]:
    """Returns every rank's operations in order.

    Raises:
        ValueError: as `check_schedule`.
    """
    check_schedule(schedule, pp, micro_batches, chunks)
    if schedule == "zbv":
        ranks = [_zbv(pp, rank, micro_batches) for rank in range(pp)]
    elif schedule in ("dualpipe", "dualpipev"):
        ranks = [_Bidirectional(schedule, pp, rank, micro_batches).operations() for rank in range(pp)]
    else:
        ranks = [_looped(schedule, pp, rank, micro_batches, chunks) for rank in range(pp)]
    return tuple(map(tuple, ranks))


@lru_cache(maxsize=256)
def operation_counts(
    schedule: str, pp: int, micro_batches: int, chunks: int = 1
) -> tuple[dict[tuple[tuple[str, int], ...], int], ...]:
    """Returns for every rank how often each operation occurs, as pairs of kind and stage without the micro-batch."""
    ranks = schedule_operations(schedule, pp, micro_batches, chunks)
    return tuple(dict(Counter(tuple((kind, stage) for kind, stage, _ in op) for op in ops)) for ops in ranks)


def _looped(schedule: str, pp: int, rank: int, micro_batches: int, chunks: int) -> list[Operation]:
    """Rank's operations where stage `rank + k pp` is its k-th chunk: 1F1B, interleaved 1F1B, zero bubble (ZB-H1).

    A rank runs forward as far ahead as the last rank's first gradient takes to come back, then one forward and one
    backward in turn. With zero bubbles, rank r leaves weight gradients r micro-batches behind and makes them at the
    end, where it would wait.
    """
    chunks = chunks if schedule != "1f1b" else 1
    total = chunks * micro_batches
    split = schedule == "zero_bubble"
    ahead = 2 if schedule == "interleaved" else 1
    warmup = min(total, (chunks - 1) * pp + ahead * (pp - 1 - rank))

    def part(kind: str, step: int) -> Part:
        turn, within = divmod(step, pp * chunks) if chunks > 1 else (step, 0)
        chunk = within // pp if chunks > 1 else 0
        micro = turn * pp + within % pp if chunks > 1 else step
        if kind != "F":
            chunk = chunks - 1 - chunk
        return Part(kind, rank + chunk * pp, micro)

    out: list[Operation] = [(part("F", step),) for step in range(warmup)]
    done = 0
    for step in range(total):
        if warmup + step < total:
            out.append((part("F", warmup + step),))
        out.append((part("I" if split else "B", step),))
        if split and step >= rank:
            out.append((part("W", done),))
            done += 1
    if split:
        out += [(part("W", step),) for step in range(done, total)]
    return out


def _zbv(pp: int, rank: int, micro_batches: int) -> list[Operation]:
    """Rank's operations of the V-shaped zero-bubble schedule (Qi et al., arXiv 2405.15362).

    Written for at least 2 pp - 1 micro-batches; with fewer, those beyond the last are left out.
    """
    first, second = rank_stages("zbv", pp, rank)
    planned = max(micro_batches, 2 * pp - 1)
    count: Counter[tuple[str, int]] = Counter()
    out: list[Part] = []

    def add(kinds: str, stage: int) -> None:
        for kind in kinds:
            out.append(Part(kind, stage, count[kind, stage]))
            count[kind, stage] += 1

    for _ in range(2 * (pp - rank) - 1):
        add("F", first)
    for _ in range(rank):
        add("F", second)
        add("F", first)
    for _ in range(pp - rank):
        add("FIW", second)
    while count["F", second] < planned:
        if count["F", first] < planned:
            add("F", first)
        add("IW", first)
        add("FIW", second)
    for _ in range(rank):
        add("I", first)
        add("I", second)
    while count["I", first] < planned:
        add("IW", first)
    for stage in (second, first):
        while count["W", stage] < planned:
            add("W", stage)
    return [(part,) for part in out if part.micro < micro_batches]


class _Bidirectional:
    """Operations of one rank under DualPipe or DualPipeV (github.com/deepseek-ai/DualPipe).

    Both run eight phases over a near stage, whose micro-batches come early, and a far one. DualPipe's second half of
    the ranks mirrors its first: micro-batches 0 to n/2 - 1 enter at rank 0, the others at the last rank. Under
    DualPipeV the far stage is the same micro-batches' second visit.
    """

    def __init__(self, schedule: str, pp: int, rank: int, micro_batches: int) -> None:
        stages = rank_stages(schedule, pp, rank)
        if schedule == "dualpipe":
            # `middle` counts from the ends to the middle, where the two directions meet.
            self.half, self.middle, self.each = pp // 2, min(rank, pp - 1 - rank), micro_batches // 2
            mirrored = rank >= self.half
            # From rank 0, micro-batch i is at stage `rank`; from the other end, n/2 + i is at stage pp - 1 - rank.
            self.stages = stages[::-1] if mirrored else stages
            self.offset = (self.each, 0) if mirrored else (0, self.each)
            # The number of overlapped pairs counts both directions' micro-batches.
            self.pairs = self.each - pp + self.middle + 1
        else:
            self.half, self.middle, self.each = pp, rank, micro_batches
            self.stages, self.offset = stages, (0, 0)
            self.pairs = micro_batches - 2 * pp + rank + 1
        self.counts: Counter[tuple[str, int]] = Counter()
        self.waiting: deque[Part] = deque()
        self.out: list[Operation] = []

    def _part(self, kind: str, side: int, split: bool = False) -> Part:
        index = self.counts[kind, side]
        self.counts[kind, side] += 1
        micro, stage = self.offset[side] + index, self.stages[side]
        if split:
            self.waiting.append(Part("W", stage, micro))
            kind = "I"
        return Part(kind, stage, micro)

    def _forward(self, side: int) -> None:
        self.out.append((self._part("F", side),))

    def _backward(self, side: int, split: bool = False) -> None:
        self.out.append((self._part("B", side, split),))

    def _weights(self) -> None:
        self.out.append((self.waiting.popleft(),))

    def _pair(self, forward: int, backward: int) -> None:
        self.out.append((self._part("F", forward), self._part("B", backward)))

    def operations(self) -> list[Operation]:
        before = self.half - self.middle - 1
        for _ in range(2 * before):
            self._forward(0)
        for _ in range(self.middle + 1):
            self._forward(0)
            self._forward(1)
        for _ in range(before):
            self._backward(1, split=True)
            self._weights()
            self._forward(1)
        for step in range(self.pairs):
            if step == 0 and before == 0:  # where the directions meet, the first two are not overlapped
                self._forward(0)
                self._backward(1)
            else:
                self._pair(0, 1)
            self._pair(1, 0)
        for _ in range(before):
            self._backward(1)
            self._pair(1, 0)
        for side, split in self._draining():
            self._backward(side, split)
        for _ in range(before):
            self._weights()
            self._backward(0, split=True)
        for _ in range(self.middle + 1):
            self._weights()
        return self.out

    def _draining(self) -> Iterator[tuple[int, bool]]:
        """Yields the last backward parts where no forward part is left; the second half of them leave W for later."""
        turns = self.middle + 1
        for index in range(2 * turns):
            yield (1, 0)[index % 2], index >= turns
