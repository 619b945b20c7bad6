"""Times of a pipeline's stages: begin and end of every forward and backward part that a rank runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = ["Span", "StageClock", "timed_stages"]


class Span(NamedTuple):
    """One part of a stage: F forward, B whole backward, I and W its halves; seconds since the clock began."""

    kind: str
    stage: int
    start: float
    end: float


@dataclass
class StageClock:
    """Marks of parts as they run: points of the host's clock on a CPU, events in the current stream on a GPU.

    An event waits for what was put into the stream before it, received tensors among it, and so a part's time is
    that of its kernels and of the collectives within them.
    """

    on_gpu: bool
    marks: list[tuple[str, int, Any, Any]] = field(default_factory=list)
    begin: Any = None

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self) -> list[Span]:
        """Returns the parts; on a GPU once they have ended."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return [Span(kind, stage, self.since(start), self.since(end)) for kind, stage, start, end in self.marks]

    def since(self, mark: Any) -> float:
        """Returns the seconds from the begin to a mark; on a GPU once both have passed."""
        return self.begin.elapsed_time(mark) * 1e-3 if self.on_gpu else mark - self.begin


@contextmanager
def timed_stages(on_gpu: bool) -> Iterator[StageClock]:
    """Times the stages of torch's pipeline schedules that run within the block."""
    from torch.distributed.pipelining.stage import _PipelineStageBase as Base

    clock = StageClock(on_gpu)

    def timed(method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def wrapper(stage: Any, *args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            out = method(stage, *args, **kwargs)
            half = kind == "B" and not kwargs.get("full_backward", True)
            clock.marks.append(("I" if half else kind, stage.stage_index, start, clock.now()))
            return out

        return wrapper

    names = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}
    kept = {name: getattr(Base, name) for name in names}
    for name, kind in names.items():
        setattr(Base, name, timed(kept[name], kind))
    clock.begin = clock.now()
    try:
        yield clock
    finally:
        for name, method in kept.items():
            setattr(Base, name, method)
