"""A training step on many devices: bytes held and sent, seconds, and what binds. Nothing here needs PyTorch.

Assumptions about overlap: DualPipe and DualPipeV hide expert exchange behind computing, which then has fewer
processors; other schedules hide none of it. FSDP's collectives run beside computing. Tensor and context parallelism,
the exchange of gradients after the last backward pass and of weights after the optimizer are hidden by nothing. Experts
are used evenly and no device is slower than another: practice adds to these times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from ..layout.accounting import flops_per_token
from ..layout.parallel_layout import ParallelLayout
from .devices import Device, find_device
from .memory import training_memory
from .schedules import Operation, operation_counts, schedule_operations
from .setup import TrainingSetup
from .simulation import simulate_schedule
from .timing import StageSeconds, assign_layers, layer_seconds, stage_seconds
from .traffic import BF16, Transfer, step_traffic, total_by

__all__ = ["StepSeconds", "TrainingPlan", "plan_training", "plan_within"]


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step by what they go to, on the pipeline rank that works longest. The parts add up to the step.

    Attributes:
        computing: products, attention and everything between them, at the rates of a whole device.
        exchange: expert dispatch and combine, as far as they are not hidden, and the processors they take.
        waits: tensor and context parallelism; sharding: FSDP's collectives beyond what computing hides.
        bubble: waiting for other stages; gradients: exchange of gradients and weights over data-parallel ranks.
        optimizer: reading and writing its states.
    """

    computing: float
    exchange: float
    waits: float
    sharding: float
    bubble: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class TrainingPlan:
    """Everything `plan_training` finds.

    Attributes:
        stages: decoder layers of every pipeline stage; prediction layers follow the last decoder layer.
        memory: bytes by kind on the fullest device, which is of pipeline rank `fullest`.
        traffic: by (purpose, link), bytes that a device of the busiest pipeline rank sends in a step.
        seconds: of a step; binds: the largest part of it, in words.
        micro_batches: that a pipeline runs in a step.
        model_flops: of the step, as `flops_per_token` counts them.
    """

    layout: ParallelLayout
    setup: TrainingSetup
    device: Device
    stages: tuple[range, ...]
    memory: dict[str, int]
    fullest: int
    traffic: dict[tuple[str, str], float]
    seconds: StepSeconds
    micro_batches: int
    model_flops: float

    @property
    def memory_total(self) -> int:
        """Bytes of the fullest device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """True if the fullest device has the memory."""
        return self.memory_total <= self.device.memory

    @property
    def tokens_per_second(self) -> float:
        """Tokens that one device trains on in a second."""
        return self.setup.batch * self.setup.sequence / self.seconds.total / self.layout.world_size

    @property
    def flops(self) -> float:
        """FLOP/s of one device, the model's only: nothing that is computed again."""
        return self.model_flops / self.seconds.total / self.layout.world_size

    @property
    def device_hours_per_trillion(self) -> float:
        """Device hours for 10^12 tokens."""
        return 1e12 / self.tokens_per_second / 3600

    @property
    def binds(self) -> str:
        """The largest part of the step."""
        parts = dataclasses.asdict(self.seconds)
        return max(parts, key=parts.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "layout": dataclasses.asdict(self.layout) | {"edp": self.layout.edp, "devices": self.layout.world_size},
            "setup": dataclasses.asdict(self.setup),
            "device": dataclasses.asdict(self.device),
            "stages": [[stage.start, stage.stop] for stage in self.stages],
            "memory_bytes": self.memory,
            "memory_total_bytes": self.memory_total,
            "fullest_pipeline_rank": self.fullest,
            "fits": self.fits,
            "sent_bytes": [
                {"purpose": purpose, "link": link, "bytes": nbytes} for (purpose, link), nbytes in self.traffic.items()
            ],
            "micro_batches": self.micro_batches,
            "seconds": dataclasses.asdict(self.seconds),
            "step_seconds": self.seconds.total,
            "binds": self.binds,
            "tokens_per_second_per_device": self.tokens_per_second,
            "model_flops_per_second_per_device": self.flops,
            "device_hours_per_trillion_tokens": self.device_hours_per_trillion,
        }


@check_types
def plan_training(
    config: DeepseekConfig,
    layout: ParallelLayout,
    device: str | Device = "H800",
    setup: TrainingSetup | None = None,
) -> TrainingPlan:
    """Plans a training step of `config`'s model.

    DeepSeek-V3 as it was trained (2,048 H800, pp 16, ep 64, DualPipe, ZeRO-1): a step took 19.9 s.

    Args:
        layout: with its `dp_shard` set (`for_devices`).
        setup: batch, schedule and number formats; None for DeepSeek-V3's.

    Raises:
        LayoutError: all that does not divide, or what the schedule cannot run.
        ValueError: no such device.
    """
    plan = plan_within(config, layout, find_device(device), setup or TrainingSetup(), math.inf, math.inf)
    assert plan is not None
    return plan


def plan_within(
    config: DeepseekConfig,
    layout: ParallelLayout,
    device: Device,
    setup: TrainingSetup,
    memory: float,
    seconds: float,
) -> TrainingPlan | None:
    """Returns the plan of a training step, or None if its fullest device holds more than `memory` bytes or one of its
    ranks alone works longer than `seconds`.

    Raises:
        LayoutError: as `plan_training`.
    """
    layout.validate(config, sequence=setup.sequence)
    schedule = setup.schedule, layout.pp, setup.micro_batches(layout), setup.chunks
    layers = layer_seconds(config, layout, setup, device)
    stages = assign_layers(config, layout, setup, device, layers)
    durations = OperationSeconds(stage_seconds(config, layout, setup, device, stages, layers), device)
    if max(sum(durations.of(counts).values()) for counts in operation_counts(*schedule)) > seconds:
        return None
    memories = [
        training_memory(config, layout, setup, device, stages, rank, operations)
        for rank, operations in enumerate(_first_operations(layout, setup))
    ]
    fullest = max(range(layout.pp), key=lambda rank: sum(memories[rank].values()))
    if sum(memories[fullest].values()) > memory:
        return None
    run = simulate_schedule(*schedule, durations.total, _hop(config, layout, setup, device))
    busiest = max(range(layout.pp), key=run.busy.__getitem__)
    sent = step_traffic(config, layout, setup, device.per_node, stages, busiest)
    # Every optimizer byte is read and written, and gradients are read for clipping and for the update.
    moved = 2 * memories[busiest]["optimizer"] + 2 * memories[busiest]["gradients"]
    step = StepSeconds(
        **durations.of(operation_counts(*schedule)[busiest]),
        bubble=run.seconds - run.busy[busiest],
        gradients=_seconds_over_links([t for t in sent if t.phase == "step"], device),
        optimizer=moved / device.memory_rate,
    )
    return TrainingPlan(
        layout=layout,
        setup=setup,
        device=device,
        stages=tuple(stages),
        memory=memories[fullest],
        fullest=fullest,
        traffic={(purpose, link): n for (purpose, link), n in total_by(sent, "purpose", "link").items() if n},
        seconds=step,
        micro_batches=schedule[2],
        model_flops=float(setup.batch * setup.sequence) * flops_per_token(config, setup.sequence, training=True),
    )


def _first_operations(layout: ParallelLayout, setup: TrainingSetup) -> Sequence[Sequence[Operation]]:
    """Returns every rank's operations, of no more micro-batches than the peak of memory depends on."""
    count = setup.micro_batches(layout)
    few = 4 * layout.pp + count % (2 * layout.pp)
    return schedule_operations(setup.schedule, layout.pp, min(count, few), setup.chunks)


def _hop(config: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, device: Device) -> float:
    """Returns the seconds that a stage's output takes to the next rank."""
    rate = device.nvlink if layout.stride("pp") * layout.pp <= device.per_node else device.network
    return BF16 * setup.tokens(layout) * config.hidden_size / rate


def _seconds_over_links(transfers: Sequence[Transfer], device: Device) -> float:
    by_link = total_by(transfers, "link")
    return by_link.get(("nvlink",), 0.0) / device.nvlink + by_link.get(("network",), 0.0) / device.network


class OperationSeconds:
    """Seconds of operations, and of what they are made."""

    def __init__(self, stages: Sequence[StageSeconds], device: Device) -> None:
        self.stages, self.device = stages, device
        self._known: dict[tuple[tuple[str, int], ...], float] = {}

    def total(self, operation: Operation) -> float:
        """Returns the seconds of one part, or of an overlapped pair."""
        key = tuple((kind, stage) for kind, stage, _ in operation)
        if key not in self._known:
            self._known[key] = sum(self._parts(key).values())
        return self._known[key]

    def of(self, counts: Mapping[tuple[tuple[str, int], ...], int]) -> dict[str, float]:
        """Returns the parts' sums over operations, given how often each occurs (`operation_counts`)."""
        out = dict.fromkeys(("computing", "exchange", "waits", "sharding"), 0.0)
        for key, count in counts.items():
            for name, seconds in self._parts(key).items():
                out[name] += count * seconds
        return out

    def _parts(self, key: tuple[tuple[str, int], ...]) -> dict[str, float]:
        """Returns the seconds of one part, or of an overlapped pair, by what they go to."""
        computing = exchange = gather = waits = sharding = 0.0
        for kind, stage in key:
            cost = self.stages[stage]
            if kind == "F":
                part, collectives = cost.forward, cost.gather
                exchange += cost.exchange
                waits += cost.waits
            elif kind == "W":
                part, collectives = cost.weights, 0.0
            else:
                part, collectives = cost.inputs + (cost.weights if kind == "B" else 0.0), cost.gather_backward
                exchange += cost.exchange_backward
                waits += cost.waits_backward
            computing += part
            gather += collectives
            sharding += max(0.0, collectives - part)
        if len(key) == 2 and exchange:
            # Beside each other: computing with fewer processors, while exchange and FSDP's collectives share the links.
            beside = max(computing / (1 - self.device.exchange_share), exchange)
            beyond = max(0.0, exchange + gather - beside)
            if beside + beyond < computing + exchange + sharding:
                exchange, sharding = beside - computing, beyond
        return {"computing": computing, "exchange": exchange, "waits": waits, "sharding": sharding}
