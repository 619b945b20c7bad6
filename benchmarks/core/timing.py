"""Interleaved timing: of any actions on a clock, and of operators on a device with cold caches.

Each timed call of an operator takes the next of several copies of its operands, so that together with the results they
are larger than any cache. On a GPU the calls on all copies are captured as one CUDA graph where possible: a replay has
no launch latency between them, and a sample is the mean over them. A call that waits for the GPU cannot be captured; it
is timed alone between two events, after a write that empties the cache.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .report import OURS, Samples

__all__ = ["COLD", "Timed", "copies", "interleave", "sample_times", "time_calls"]

SLOW = 10.0  # seconds from which a run counts even as a warm-up: warming up saves little of it
COLD = 2**28  # bytes between two uses of one operand: several times the last-level cache of a GPU
_MOST = 256  # copies
_REPLAY_S = 2e-3  # of a replayed stretch: events resolve half a microsecond
_CPU_COPIES = 16


# ------------------------------------------------------------------ any actions


def interleave(
    actions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    budget_s: float = math.inf,
    clock: Callable[[], float] | None = None,
) -> dict[str, Samples]:
    """Times the actions in turn, A, B, A, B, ..., so that a slow minute of the machine affects all of them.

    Args:
        actions: by contestant. On a GPU each must synchronize before it returns.
        rounds: counted runs of each, at most.
        warmup: runs before them that do not count, unless they take longer than `SLOW`.
        budget_s: an action with a counted run is not run again if its total, warm-up included, would exceed this.
        clock: default `time.perf_counter`; `time.process_time` counts this process's threads alone, where others run.

    Returns:
        the seconds of each counted run.
    """
    spent = dict.fromkeys(actions, 0.0)
    last = dict.fromkeys(actions, 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warmup + rounds):
        for name, action in actions.items():
            done = seconds[name]
            if done and (len(done) == rounds or spent[name] + last[name] > budget_s):
                continue
            last[name] = _time(action, clock or time.perf_counter)
            spent[name] += last[name]
            if turn >= warmup or last[name] >= SLOW:
                done.append(last[name])
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def sample_times(action: Callable[[], object], *, rounds: int, warmup: int = 1) -> Samples:
    """Times one action alone, in seconds."""
    return interleave({OURS: action}, rounds=rounds, warmup=warmup)[OURS]


def _time(action: Callable[[], object], clock: Callable[[], float]) -> float:
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whichever action allocated last
    try:
        start = clock()
        action()
        return clock() - start
    finally:
        gc.enable()


# ------------------------------------------------------------------ operators


@dataclass(frozen=True)
class Timed:
    """Seconds per call.

    Attributes:
        method: "graph", "events" or "clock".
    """

    samples: Samples
    method: str


def copies(inputs: tuple[Any, ...], moved: int, device: torch.device, cold: int = COLD) -> list[tuple[Any, ...]]:
    """Returns `inputs` and enough copies of them that calls on all, each moving `moved` bytes, move `cold` bytes."""
    most = _MOST if device.type == "cuda" else _CPU_COPIES
    count = max(1, min(most, -(-cold // max(moved, 1))))
    return [inputs, *(tuple(map(_copy, inputs)) for _ in range(count - 1))]


def _copy(value: Any) -> Any:
    """A tensor of the same strides: `clone` would drop the padding between rows."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    return out.requires_grad_(value.requires_grad)


def time_calls(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    device: torch.device,
    *,
    rounds: int = 20,
    budget_s: float = 3.0,
) -> dict[str, Timed]:
    """Times each call on the operands in `inputs`, in turn.

    Args:
        calls: by contestant. They have run before, so that nothing is compiled here.
        rounds: samples of each, at most.
        budget_s: seconds for each after which it is not run again.
    """
    if device.type != "cuda":
        actions = {name: _rotating(call, inputs) for name, call in calls.items()}
        gc.freeze()  # `interleave` collects garbage before each run, which takes 0.1 s if it visits all of torch
        try:
            samples = interleave(actions, rounds=rounds, budget_s=budget_s)
        finally:
            gc.unfreeze()
        return {name: Timed(one, "clock") for name, one in samples.items()}
    runners = {name: _runner(call, inputs, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, runner in runners.items():
            if seconds[name] and spent[name] > budget_s:
                continue
            start = time.perf_counter()
            seconds[name].append(runner.sample())
            spent[name] += time.perf_counter() - start
    return {name: Timed(Samples(tuple(values)), runners[name].method) for name, values in seconds.items()}


def _rotating(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    turns = itertools.cycle(inputs)
    return lambda: call(*next(turns))


# ------------------------------------------------------------------ CUDA


def _runner(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], device: torch.device) -> _Graph | _Events:
    if _waits(call, inputs[0]):
        return _Events(call, inputs, device)
    try:
        return _Graph(call, inputs)
    except RuntimeError:  # something else that a graph cannot hold
        return _Events(call, inputs, device)


def _waits(call: Callable[..., Any], operands: tuple[Any, ...]) -> bool:
    """Returns True if a call makes the host wait for the GPU; to find out in a capture would spoil the allocator."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*operands)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class _Graph:
    """One CUDA graph of the call on every copy of its operands."""

    method = "graph"

    def __init__(self, call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> None:
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._calls = len(inputs)
        # Results are kept, or each call would write into the memory, still cached, of the call before.
        with torch.cuda.graph(self._graph):
            self._results = [call(*operands) for operands in inputs]
        self._replay(1)
        self._replays = max(1, round(_REPLAY_S / self._replay(1)))

    def sample(self) -> float:
        return self._replay(self._replays) / (self._replays * self._calls)

    def _replay(self, times: int) -> float:
        return _between_events(lambda: [self._graph.replay() for _ in range(times)])


class _Events:
    """The call alone, the cache emptied before it."""

    method = "events"

    def __init__(self, call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], device: torch.device) -> None:
        self._next = _rotating(call, inputs)
        self._flush = torch.empty(COLD, dtype=torch.uint8, device=device)

    def sample(self) -> float:
        self._flush.zero_()
        return _between_events(self._next)


def _between_events(action: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = action()
    end.record()
    torch.cuda.synchronize()
    del result  # alive until here, so that its memory was not reused within the action
    return start.elapsed_time(end) / 1e3
