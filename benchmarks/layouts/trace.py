"""Communication of a profiled step: how long it took, and how much of that nothing was computed beside it.

On a GPU the intervals are those of kernels: NCCL's are communication, all others are computing. On a CPU, gloo's
collectives are communication, from their begin on a thread of its own to their end, and PyTorch's operators are
computing. Time in which neither happens (launches, Python, waits) is idle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .intervals import Interval, beyond, clipped, joined, length

__all__ = ["STEP", "Overlap", "Timeline", "kind_of", "measure_overlap", "read_trace"]

STEP = "benchmark step"  # name of the annotation around the profiled step
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_OPERATORS = re.compile(r"(aten|deepseek\w*)::")
_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send",
    "send": "send",
    "recv": "send",
    "coalesced": "send",
}


@dataclass
class Timeline:
    """Intervals of one rank's step, in seconds.

    Attributes:
        window: of the whole step; computing: disjoint intervals; communication: by kind of collective, each once.
    """

    window: Interval
    computing: list[Interval] = field(default_factory=list)
    communication: dict[str, list[Interval]] = field(default_factory=dict)


@dataclass(frozen=True)
class Overlap:
    """Seconds of a step on one rank.

    Attributes:
        step: from its begin to its end; computing, communicating: in which at least one of them ran.
        exposed: communicating with no computing beside it; overlapped: the rest of `communicating`.
        idle: neither.
        by_kind: communicating, for each kind of collective alone.
        sums: lengths of all collectives of a kind added up, however many ran at a time.
    """

    step: float
    computing: float
    communicating: float
    exposed: float
    idle: float
    by_kind: Mapping[str, float]
    sums: Mapping[str, float]

    @property
    def overlapped(self) -> float:
        return self.communicating - self.exposed


def kind_of(name: str, send_kind: str = "send") -> str | None:
    """Returns the kind of a collective by the name of its kernel, of gloo's event or of c10d; None for anything else.

    Args:
        send_kind: of NCCL's kernels that send and receive: "all_to_all" where nothing else is sent so.
    """
    text = re.sub("[^a-z]", "", name.lower().removeprefix("gloo:").removeprefix("nccldevkernel"))
    kind = next((kind for part, kind in _KINDS.items() if text.startswith(part)), None)
    return send_kind if text.startswith("sendrecv") else kind


def read_trace(events: Iterable[Mapping[str, Any]], send_kind: str = "send") -> Timeline:
    """Reads a step from the `traceEvents` of a trace that PyTorch's profiler has written.

    Args:
        events: with "ts" and "dur" in microseconds, and an annotation `STEP`.
        send_kind: as for `kind_of`; the collective's name that the profiler gives a kernel comes before it.

    Raises:
        ValueError: there is no such annotation.
    """
    spans = [event for event in events if event.get("ph", "X") == "X" and "dur" in event]
    window = next((_interval(event) for event in spans if event.get("name") == STEP and _is_host(event)), None)
    if window is None:
        raise ValueError(f"expected a trace with an annotation {STEP!r}, got none")
    on_device = any(event.get("cat") in _DEVICE for event in spans)
    computing: list[Interval] = []
    sent: dict[str, list[Interval]] = {}
    for event in spans:
        kind = _kernel(event, send_kind) if on_device else _host_event(event)
        if kind == "computing":
            computing.append(_interval(event))
        elif kind is not None:
            sent.setdefault(kind, []).append(_interval(event))
    return Timeline(
        window,
        joined(clipped(computing, window)),
        {kind: clipped(intervals, window) for kind, intervals in sent.items()},
    )


def _interval(event: Mapping[str, Any]) -> Interval:
    start = float(event["ts"]) * 1e-6
    return start, start + float(event["dur"]) * 1e-6


def _is_host(event: Mapping[str, Any]) -> bool:
    return event.get("cat") != "gpu_user_annotation"  # the same annotation once more, on the device's own clock


def _kernel(event: Mapping[str, Any], send_kind: str) -> str | None:
    if event.get("cat") not in _DEVICE:
        return None
    name = str(event.get("name", ""))
    if not name.lower().startswith("nccl"):
        return "computing"
    named = event.get("args", {}).get("Collective name")
    return (kind_of(str(named)) if named else None) or kind_of(name, send_kind) or "other"


def _host_event(event: Mapping[str, Any]) -> str | None:
    name = str(event.get("name", ""))
    if name.startswith("gloo:"):
        return kind_of(name) or "other"
    return "computing" if event.get("cat") == "cpu_op" and _OPERATORS.match(name) else None


def measure_overlap(timeline: Timeline) -> Overlap:
    """Returns how much of a step's communication ran beside computing."""
    everything = joined(interval for intervals in timeline.communication.values() for interval in intervals)
    step = timeline.window[1] - timeline.window[0]
    return Overlap(
        step=step,
        computing=length(timeline.computing),
        communicating=length(everything),
        exposed=length(beyond(everything, timeline.computing)),
        idle=step - length(joined([*everything, *timeline.computing])),
        by_kind={kind: length(joined(intervals)) for kind, intervals in timeline.communication.items()},
        sums={kind: length(intervals) for kind, intervals in timeline.communication.items()},
    )
