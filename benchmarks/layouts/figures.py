"""Arithmetic of the figures: model FLOP utilization, bandwidth, and a pipeline's bubble with its simulation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from deepseek_arch.planning.devices import DEVICES, Device
from deepseek_arch.planning.schedules import Operation, schedule_operations, stage_count
from deepseek_arch.planning.simulation import simulate

from .intervals import joined, length
from .stage_clock import Span

__all__ = ["bandwidth", "bubble_share", "device_named", "mfu", "simulated_bubble", "stage_durations"]


def device_named(name: str | None) -> Device | None:
    """Returns the planner's device by the name a GPU's driver reports, such as "NVIDIA H100 80GB HBM3"; or None."""
    words = re.split(r"[^a-z0-9]+", (name or "").lower())
    return next((DEVICES[word] for word in words if word in DEVICES), None)


def mfu(flops_per_token: float, tokens_per_second: float, devices: int, peak: float) -> float:
    """Returns the share of the devices' peak FLOP/s that the model's own FLOPs take, nothing recomputed counted."""
    return flops_per_token * tokens_per_second / (devices * peak)


def bandwidth(nbytes: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns bytes/s of each kind of collective that sent something and took time."""
    return {kind: sent / seconds[kind] for kind, sent in nbytes.items() if sent and seconds.get(kind, 0.0) > 0}


def bubble_share(spans: Iterable[Span], step: float) -> float:
    """Returns the share of a rank's step in which none of its stages ran."""
    return 1 - length(joined((span.start, span.end) for span in spans)) / step


def stage_durations(spans: Iterable[Span]) -> dict[tuple[str, int], float]:
    """Returns the median seconds of each part (F, B, I, W) of each stage."""
    times: dict[tuple[str, int], list[float]] = {}
    for span in spans:
        times.setdefault((span.kind, span.stage), []).append(span.end - span.start)
    return {key: median(values) for key, values in times.items()}


def simulated_bubble(
    schedule: str, pp: int, micro_batches: int, chunks: int, durations: Mapping[tuple[str, int], float]
) -> float:
    """Returns the share of all ranks' time that a schedule leaves idle by its order alone, nothing waiting for links.

    Args:
        schedule, chunks: as for `planning.schedules.schedule_operations`.
        durations: of each part of each stage. A whole backward pass that was never run whole lasts as its halves do,
            and a half of one that was never split is a half of it.

    Raises:
        ValueError: a stage was never run, or as `schedule_operations`.
    """

    def seconds(kind: str, stage: int) -> float:
        known = durations.get((kind, stage))
        if known is not None:
            return known
        if kind == "B" and ("I", stage) in durations and ("W", stage) in durations:
            return durations["I", stage] + durations["W", stage]
        if kind in "IW" and ("B", stage) in durations:
            return durations["B", stage] / 2
        raise ValueError(f"expected times of part {kind} of stage {stage}, got none")

    def duration(operation: Operation) -> float:
        return sum(seconds(kind, stage) for kind, stage, _ in operation)

    ranks: Sequence[Sequence[Operation]] = schedule_operations(schedule, pp, micro_batches, chunks)
    run = simulate(ranks, stage_count(schedule, pp, chunks), duration)
    return 1 - sum(run.busy) / (pp * run.seconds)
