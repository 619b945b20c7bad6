"""Measurements of one layout: every rank runs them together, and gets the figures of all."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

import deepseek_arch as da
from deepseek_arch.parallel.collectives import sent_bytes

from ..core.machine import peak_memory, resident_memory
from .figures import bubble_share, simulated_bubble, stage_durations
from .sent_bytes import CountedCollectives
from .stage_clock import Span, timed_stages
from .trace import STEP, Overlap, measure_overlap, read_trace
from .training_run import LayoutRun

__all__ = [
    "Measured",
    "PeakMemory",
    "count_bytes",
    "gathered",
    "measure_bubble",
    "measure_decoding",
    "profile_step",
    "time_dispatches",
    "time_steps",
]


@dataclass
class Measured:
    """Figures of one layout, lists by rank.

    Attributes:
        first_loss, first_norm: loss of the first step, and the norm of its gradients.
        seconds: of each timed step, that of the slowest rank.
        memory: bytes at the peak, beyond those before the model was made.
        sent, calls: bytes that a step sends and its collectives, by kind; purposes: bytes by what they are for, where
            this package sends them.
        overlaps: of a profiled step.
        bubbles: share of a step in which a rank runs no stage; simulated: what the schedule's order alone leaves idle.
        dispatches: seconds of a step by the way of the tokens to their experts.
        decoding: tokens/s of all ranks.
    """

    first_loss: float = 0.0
    first_norm: float = 0.0
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    sent: list[dict[str, int]] = field(default_factory=list)
    calls: list[dict[str, int]] = field(default_factory=list)
    purposes: list[dict[str, int]] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    bubbles: list[float] = field(default_factory=list)
    simulated: float | None = None
    dispatches: dict[str, list[float]] = field(default_factory=dict)
    decoding: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return asdict(self)


def gathered(value: Any) -> list[Any]:
    """Returns the values of all ranks."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most bytes of this rank beyond those that it has when this is made.

    On a GPU those of PyTorch's allocator. On a CPU those of the process; where the system cannot reset its record,
    an earlier peak of the process may hide this one.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            _return_free_memory()
            record = Path("/proc/self/clear_refs")
            if record.exists():
                record.write_text("5")  # resets the peak of the resident memory
            self.before = resident_memory()

    def beyond(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory()
        return max(0, peak - self.before)


def _return_free_memory() -> None:
    """Gives the system back what is free, which a model would use again and so seem not to need."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def time_steps(step: Callable[[int], object], device: torch.device, rounds: int, warmup: int) -> list[float]:
    """Returns the seconds of each step, on the rank that takes longest."""
    seconds = []
    for number in range(warmup + rounds):
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        step(number)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return [max(each) for each in zip(*gathered(seconds[warmup:]), strict=True)]


def count_bytes(run: LayoutRun) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Runs forward and backward passes of a step; returns its bytes and calls by kind, and its bytes by purpose."""
    rows = run.rows(0)
    sent_bytes.clear()
    with CountedCollectives() as counted:
        run.backward(rows)
    run.optimizer.zero_grad(set_to_none=True)
    return dict(counted.nbytes), dict(counted.calls), {name: n for name, n in sent_bytes.items() if n}


def profile_step(step: Callable[[int], object], device: torch.device, send_kind: str) -> Overlap:
    """Profiles a step and returns this rank's times of computing and communication."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize(device)
    dist.barrier()
    with profile(activities=activities) as profiler, record_function(STEP):
        step(0)
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return measure_overlap(read_trace(events, send_kind))


def measure_bubble(
    run: LayoutRun, device: torch.device, schedule: tuple[str, int] | None
) -> tuple[list[float], float | None]:
    """Returns each rank's share of a step without a stage, and that of the simulated schedule with the same times.

    Args:
        schedule: the planner's name of it and its stages a rank; None if it has none.
    """
    rows = run.rows(0)
    synchronize(device)
    dist.barrier()
    with timed_stages(device.type == "cuda") as clock:
        run.pipeline.step(rows, rows, mtp_weight=run.mtp_weight)
        synchronize(device)
        end = clock.now()
        spans = clock.spans()
        seconds = clock.since(end)
    run.optimizer.zero_grad(set_to_none=True)
    shares = gathered(bubble_share(spans, seconds))
    everything = [Span(*span) for of_rank in gathered([tuple(span) for span in spans]) for span in of_rank]
    if schedule is None:
        return shares, None
    layout = run.model.meshes.layout
    return shares, simulated_bubble(schedule[0], layout.pp, run.parts, schedule[1], stage_durations(everything))


def measure_decoding(
    run: LayoutRun, device: torch.device, *, batch: int, prompt: int, new_tokens: int, rounds: int
) -> list[float]:
    """Returns tokens/s of all ranks together while they decode greedily, in each round, the prompt's pass left out.

    Every data-parallel rank continues `batch` prompts of its own.

    Raises:
        ValueError: ranks of a tensor-parallel group decoded different tokens.
    """
    model = run.model.eval()
    layout, group = model.meshes.layout, model.meshes.data
    draw = torch.Generator().manual_seed(dist.get_rank(group))
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=draw).to(device)

    def decode(count: int) -> torch.Tensor:
        return da.generate(model, ids, max_new_tokens=count, eos_token_id=[])

    tokens = gathered(decode(new_tokens).tolist())
    for first in range(0, len(tokens), layout.tp):
        if any(other != tokens[first] for other in tokens[first : first + layout.tp]):
            raise ValueError(f"expected equal tokens on ranks {first} to {first + layout.tp - 1}, got different ones")
    longer, shorter = (time_steps(lambda _, n=n: decode(n), device, rounds, 1) for n in (new_tokens, 1))
    model.train()
    decoded = batch * layout.dp * (new_tokens - 1)
    return [decoded / max(long - short, 1e-9) for long, short in zip(longer, shorter, strict=True)]


def time_dispatches(
    run: LayoutRun, ways: Sequence[str], ranks_per_node: int, device: torch.device, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Returns the seconds of a step for each way of tokens to their experts, and leaves the model with "rows"."""
    out: dict[str, list[float]] = {}
    for way in ways:
        options = {"ranks_per_node": ranks_per_node} if way == "nodes" else {}
        da.use_dispatch(run.model, way, **options)
        out[way] = time_steps(run.step, device, rounds, warmup)
    da.use_dispatch(run.model, "rows")
    return out
