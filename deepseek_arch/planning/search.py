"""The fastest layouts that fit, out of all that divide."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..config.argument_types import check_types, shown
from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import AXES, LayoutError, ParallelLayout
from .devices import RESERVED, Device, find_device
from .inference import InferencePlan, InferenceSetup, plan_inference
from .schedules import SCHEDULES
from .setup import RECOMPUTE, TrainingSetup
from .shards import elements, end_parameters, layer_parameters, per_layer
from .timing import end_seconds, layer_seconds
from .training import TrainingPlan, plan_training, plan_within

__all__ = ["TrainingSearch", "candidate_layouts", "search_inference", "search_training"]

LONG_SEQUENCE = 32768  # from here on, sequences are cut over devices as well


@dataclass(frozen=True)
class TrainingSearch:
    """Outcome of `search_training`.

    Attributes:
        plans: the fastest that fit, fastest first; smallest: where none fits, the one that needs the least memory.
        considered: layouts and setups that divide; refused: of those that were worked out, how many did not fit, or
            worked longer than what had been found.
    """

    plans: tuple[TrainingPlan, ...]
    smallest: TrainingPlan | None
    considered: int
    refused: int


def _check_search(fixed: Mapping[str, int] | None, top: int) -> dict[str, int]:
    """Returns the axes that are fixed, checked."""
    axes = dict(fixed or {})
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise LayoutError(f"expected fixed to have axes of {', '.join(AXES)}, got {shown(unknown)}")
    ParallelLayout(**axes | {"ep": 1, "etp": 1})  # of each size alone; whether they divide is seen for each layout
    if top < 1:
        raise ValueError(f"expected top >= 1, got {shown(top)}")
    return axes


def candidate_layouts(
    config: DeepseekConfig, devices: int, per_node: int, sequence: int, fixed: Mapping[str, int]
) -> Iterator[ParallelLayout]:
    """Yields the layouts of `devices` devices that fit the config, with the axes of `fixed` as given.

    Tensor parallelism stays within a node, `dp_replicate` is 1 and `etp` is 1 or `tp` unless fixed; sequences are cut
    from 32,768 tokens on.
    """

    def sizes(axis: str, most: int) -> Sequence[int]:
        if axis in fixed:
            return (fixed[axis],)
        return [n for n in range(1, most + 1) if devices % n == 0]

    experts = config.n_routed_experts or 1
    for pp, tp, cp in itertools.product(
        sizes("pp", config.num_hidden_layers),
        sizes("tp", per_node),
        sizes("cp", per_node if sequence >= LONG_SEQUENCE else 1),
    ):
        for ep, etp in itertools.product(sizes("ep", experts), sorted({fixed.get("etp", 1), fixed.get("etp", tp)})):
            axes = {**fixed, "pp": pp, "tp": tp, "cp": cp, "ep": ep, "etp": etp}
            try:
                layout = ParallelLayout(**axes).for_devices(devices)
                layout.validate(config, sequence=sequence)
            except LayoutError:
                continue
            yield layout


def _setups(base: TrainingSetup, free: Sequence[str], pp: int) -> Iterator[TrainingSetup]:
    """Yields `base` with every value of the fields named in `free`."""
    schedules: Sequence[tuple[str, int]] = ((base.schedule, base.chunks),)
    if "schedule" in free:
        # Without a pipeline they are all the same but for overlap, which needs two micro-batches at a time.
        names = SCHEDULES if pp > 1 else ("1f1b", "dualpipev")
        schedules = [(name, 2 if name == "interleaved" else 1) for name in names]
    for (schedule, chunks), zero, recompute in itertools.product(
        schedules,
        (1, 2, 3) if "zero" in free else (base.zero,),
        RECOMPUTE if "recompute" in free else (base.recompute,),
    ):
        yield replace(base, schedule=schedule, chunks=chunks, zero=zero, recompute=recompute)


@check_types
def search_training(
    config: DeepseekConfig,
    devices: int,
    device: str | Device = "H800",
    setup: TrainingSetup | None = None,
    *,
    fixed: Mapping[str, int] | None = None,
    free: Sequence[str] = ("schedule", "zero", "recompute"),
    top: int = 10,
) -> TrainingSearch:
    """Finds the layouts and setups with the shortest step among those that fit.

    Lower bounds of memory and time decide which are worked out; the order of the rest cannot change the result.

    Args:
        setup: batch, sequence, number formats, and the fields that are not in `free`.
        fixed: sizes of axes that are not searched.
        free: which of schedule, zero and recompute are searched.
        top: how many plans to return.

    Raises:
        LayoutError: nothing divides; the message is that of the only layout, if all axes are fixed.
        ValueError: no such device.
    """
    axes = _check_search(fixed, top)
    device, base = find_device(device), setup or TrainingSetup()
    bounds: list[tuple[float, float, int, ParallelLayout, TrainingSetup]] = []
    error: LayoutError | None = None
    for layout in candidate_layouts(config, devices, device.per_node, base.sequence, axes):
        seconds: dict[tuple[str, bool], float] = {}
        least: dict[tuple[int, bool], float] = {}
        for candidate in _setups(base, free, layout.pp):
            try:
                micro_batches = candidate.micro_batches(layout)
                overlaps = candidate.schedule in ("dualpipe", "dualpipev")
                work = candidate.recompute, overlaps
                if work not in seconds:
                    seconds[work] = _least_seconds(config, layout, candidate, device, micro_batches)
            except LayoutError as problem:
                error = problem
                continue
            held = candidate.zero, candidate.schedule == "dualpipe"
            if held not in least:
                least[held] = _least_bytes(config, layout, candidate, device)
            bounds.append((seconds[work], least[held], len(bounds), layout, candidate))
    if not bounds:
        raise error or LayoutError(f"expected a layout of {devices} devices that divides the model, found none")
    return _best(config, device, bounds, top)


def _best(
    config: DeepseekConfig,
    device: Device,
    bounds: list[tuple[float, float, int, ParallelLayout, TrainingSetup]],
    top: int,
) -> TrainingSearch:
    found: list[TrainingPlan] = []
    refused = 0
    considered = len(bounds)
    small = [bound for bound in bounds if bound[1] <= device.memory]
    heapq.heapify(small)
    while small:
        seconds, _, _, layout, setup = heapq.heappop(small)
        if len(found) == top and seconds >= found[-1].seconds.total:
            break
        try:
            slowest = found[-1].seconds.total if len(found) == top else math.inf
            plan = plan_within(config, layout, device, setup, device.memory, slowest)
        except LayoutError:  # more stages than layers
            considered -= 1
            continue
        if plan is None:
            refused += 1
            continue
        found = sorted([*found, plan], key=lambda p: (p.seconds.total, p.memory_total))[:top]
    smallest = None
    if not found:
        for _, _, _, layout, setup in sorted(bounds, key=lambda bound: bound[1])[:8]:
            try:
                plan = plan_training(config, layout, device, setup)
            except LayoutError:
                continue
            if smallest is None or plan.memory_total < smallest.memory_total:
                smallest = plan
    return TrainingSearch(tuple(found), smallest, considered, refused)


def _least_seconds(
    config: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, device: Device, micro_batches: int
) -> float:
    """Returns seconds that no schedule can beat: all stages' work, spread evenly over the pipeline's ranks."""
    total = sum(layer_seconds(config, layout, setup, device), end_seconds(config, layout, setup, device, False, True))
    work = total.computing + total.waits + total.waits_backward
    if setup.schedule not in ("dualpipe", "dualpipev"):
        work += total.exchange + total.exchange_backward
    return micro_batches * work / layout.pp


def _least_bytes(config: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, device: Device) -> float:
    """Returns bytes that the fullest device has at least: parameters spread evenly over the pipeline's ranks."""
    parameters = per_layer(config, lambda i: layer_parameters(config, i, layout))
    ends = end_parameters(config, layout, True, True)
    copies = 2 if setup.schedule == "dualpipe" else 1
    total = 0.0
    for routed, shards in ((False, layout.dense_shards), (True, layout.edp)):
        count = elements(ends, routed) + sum(elements(of_layer, routed) for of_layer in parameters)
        weights = setup.weight_bytes / (shards if setup.zero == 3 else 1)
        gradients = setup.gradient_bytes / (shards if setup.zero >= 2 else 1)
        states = (setup.master_bytes + 2 * setup.moment_bytes) / shards
        total += count * (weights + gradients + states)
    return copies * total / layout.pp + RESERVED * device.memory


@check_types
def search_inference(
    config: DeepseekConfig,
    devices: int,
    device: str | Device = "H800",
    setup: InferenceSetup | None = None,
    *,
    fixed: Mapping[str, int] | None = None,
    top: int = 10,
) -> list[InferencePlan]:
    """Returns the layouts with the most decoded tokens per second among those that fit, best first.

    Args:
        setup: its `batch` is that of the whole group of devices' data-parallel ranks each.

    Raises:
        LayoutError: nothing divides, or `fixed` names no axes.
        ValueError: no such device.
    """
    axes = _check_search(fixed, top)
    device, setup = find_device(device), setup or InferenceSetup()
    main = config.replace(num_nextn_predict_layers=0)
    plans: list[InferencePlan] = []
    error: LayoutError | None = None
    axes = {**axes, "pp": axes.get("pp", 1), "cp": axes.get("cp", 1)}
    for layout in candidate_layouts(main, devices, device.per_node, setup.context, axes):
        try:
            plans.append(plan_inference(config, layout, device, setup))
        except LayoutError as problem:
            error = problem
    if not plans:
        raise error or LayoutError(f"expected a layout of {devices} devices that divides the model, found none")
    plans.sort(key=lambda plan: (not plan.fits, -plan.decode_tokens_per_second, plan.memory_total))
    return plans[:top]
