"""Seconds of layers and stages on one rank: products and attention by rates, exchanges by bytes over links."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import LayoutError, ParallelLayout
from .costs import Work, head_work, layer_work
from .devices import Device
from .schedules import rank_stages, stage_count
from .setup import TrainingSetup
from .shards import per_layer
from .traffic import Transfer, end_traffic, layer_traffic

__all__ = ["StageSeconds", "assign_layers", "cut_layers", "end_seconds", "layer_seconds", "stage_seconds"]


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one micro-batch through some layers on one rank.

    Attributes:
        forward, inputs, weights: computing the forward pass and the gradients of inputs and of weights.
        exchange, exchange_backward: expert dispatch and combine, which overlapped passes can hide.
        waits, waits_backward: tensor and context parallelism, which nothing hides.
        gather, gather_backward: FSDP's collectives, which run beside computing and are seen where they take longer.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    exchange: float = 0.0
    exchange_backward: float = 0.0
    waits: float = 0.0
    waits_backward: float = 0.0
    gather: float = 0.0
    gather_backward: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def computing(self) -> float:
        """Seconds of all three parts without any exchange."""
        return self.forward + self.inputs + self.weights


def _computing(work: Work, device: Device, setup: TrainingSetup) -> StageSeconds:
    """Returns the seconds of `work`. Attention's backward pass has five products for the forward pass's two."""
    fp8 = setup.precision == "fp8"
    if fp8 and not device.fp8:
        raise LayoutError(f"expected a device with FP8 products for precision fp8, got {device.name}")
    rate, wgrad = (device.fp8, device.fp8_wgrad) if fp8 else (device.bf16, device.bf16)
    forward = work.products / rate + work.plain / device.bf16 + work.attention / device.attention
    inputs = work.products / rate + work.plain / device.bf16 + 2.5 * work.attention / device.attention_backward
    if setup.recompute == "selective":
        inputs += work.again / rate
    elif setup.recompute == "full":
        inputs += forward
    weights = work.products / wgrad + work.plain / device.bf16
    scale = 1 / (1 - device.unfused)
    return StageSeconds(forward * scale, inputs * scale, weights * scale)


def _links(transfers: Iterable[Transfer], device: Device) -> float:
    """Returns the seconds of transfers whose links work beside each other: the slower link's."""
    busy = {"nvlink": 0.0, "network": 0.0}
    for transfer in transfers:
        busy[transfer.link] += transfer.nbytes
    return max(busy["nvlink"] / device.nvlink, busy["network"] / device.network)


def _exchanges(transfers: Sequence[Transfer], device: Device) -> StageSeconds:
    def of(phase: str, *purposes: str) -> float:
        return _links((t for t in transfers if t.phase == phase and t.purpose in purposes), device)

    experts = ("expert dispatch", "expert combine")
    waits = ("tensor parallel", "context parallel")
    sharding = ("weight gathering", "gradient reduction")
    return StageSeconds(
        exchange=of("forward", *experts),
        exchange_backward=of("backward", *experts),
        waits=of("forward", *waits),
        waits_backward=of("backward", *waits),
        gather=of("forward", *sharding),
        gather_backward=of("backward", *sharding),
    )


def layer_seconds(
    config: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, device: Device
) -> list[StageSeconds]:
    """Returns the seconds of every decoder layer and prediction layer.

    Raises:
        LayoutError: FP8 products on a device without them.
    """

    def one(layer_idx: int) -> StageSeconds:
        work = layer_work(config, layer_idx, layout, setup.tokens(layout), setup.sequence)
        sent = layer_traffic(config, layer_idx, layout, setup, device.per_node)
        return _computing(work, device, setup) + _exchanges(sent, device)

    return per_layer(config, one)


def end_seconds(
    config: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, device: Device, first: bool, last: bool
) -> StageSeconds:
    """Returns the seconds of the embedding, if `first`, and of the heads and the loss, if `last`."""
    out = _exchanges(list(end_traffic(config, layout, setup, device.per_node, first, last)), device)
    if last:
        # Recomputing layers does not repeat the head.
        out += _computing(head_work(config, layout, setup.tokens(layout)), device, replace(setup, recompute="none"))
    return out


def stage_seconds(
    config: DeepseekConfig,
    layout: ParallelLayout,
    setup: TrainingSetup,
    device: Device,
    stages: Sequence[range],
    layers: Sequence[StageSeconds],
) -> list[StageSeconds]:
    """Returns the seconds of every stage, given those of the layers."""
    out = []
    for stage, held in enumerate(stages):
        first, last = stage == 0, stage == len(stages) - 1
        ends = end_seconds(config, layout, setup, device, first, last)
        out.append(sum((layers[i] for i in held), ends))
    return out


def assign_layers(
    config: DeepseekConfig,
    layout: ParallelLayout,
    setup: TrainingSetup,
    device: Device,
    layers: Sequence[StageSeconds],
) -> list[range]:
    """Returns the layers of every pipeline stage, so cut that ranks compute as equally long as they can.

    Prediction layers, the final norm and the head are on the last stage. Where these alone take longer than a stage
    should, the other stages of the same rank get less.

    Raises:
        LayoutError: more stages than layers.
    """
    count, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    stages = stage_count(setup.schedule, layout.pp, setup.chunks)
    ends = end_seconds(config, layout, setup, device, False, True)
    last = ends.computing + sum(layers[i].computing for i in range(count, count + depth))
    costs = [layers[i].computing for i in range(count)]
    mean = (sum(costs) + last) / stages
    targets = [mean] * stages
    ranks = (rank_stages(setup.schedule, layout.pp, rank, setup.chunks) for rank in range(layout.pp))
    others = [stage for held in ranks if stages - 1 in held for stage in held if stage != stages - 1]
    excess = max(0.0, last - mean)
    for stage in others:
        targets[stage] -= excess / len(others)
        targets[-1] += excess / len(others)
    cuts = cut_layers(tuple(costs), last, tuple(targets))
    return [*cuts[:-1], range(cuts[-1].start, count + depth)]


@lru_cache(maxsize=256)
def cut_layers(costs: tuple[float, ...], last: float, targets: tuple[float, ...]) -> tuple[range, ...]:
    """Cuts layers into consecutive stages whose costs are nearest to `targets`, by the sum of squared differences.

    Args:
        last: cost of what the last stage has beside layers. It alone may have no layer.

    Raises:
        LayoutError: more stages than layers, the last stage not counted.
    """
    count, stages = len(costs), len(targets)
    if stages > count + 1:
        raise LayoutError(f"expected at most {count + 1} stages for {count} layers, got {stages}")
    sums = list(accumulate(costs, initial=0.0))
    best = [0.0] + [math.inf] * count  # best[i]: layers before i in the stages so far
    choices: list[list[int]] = []
    for stage, target in enumerate(targets):
        final = stage == stages - 1
        extra, fewest = (last, int(stages == 1)) if final else (0.0, 1)
        following, choice = [math.inf] * (count + 1), [0] * (count + 1)
        for end in [count] if final else range(stage + 1, count + 1):
            for start in range(stage, end - fewest + 1):
                total = best[start] + (sums[end] - sums[start] + extra - target) ** 2
                if total < following[end]:
                    following[end], choice[end] = total, start
        best = following
        choices.append(choice)
    cuts, end = [], count
    for choice in reversed(choices):
        cuts.append(range(choice[end], end))
        end = choice[end]
    return tuple(reversed(cuts))
