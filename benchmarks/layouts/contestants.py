"""Layouts to measure: those that fit a number of devices, and the planner's settings and memory for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout, parse_axes
from deepseek_arch.parallel.stage_plan import check_microbatches, plan_stages
from deepseek_arch.planning.devices import DEVICES, Device
from deepseek_arch.planning.memory import training_memory
from deepseek_arch.planning.schedules import schedule_operations
from deepseek_arch.planning.setup import TrainingSetup

__all__ = ["Contestant", "config_within", "contestants_of", "cut_config", "predicted_memory", "training_setup"]

# torch's schedules by the planner's names, and the stages of a rank; GPipe has none there.
_SCHEDULES = {
    "1F1B": ("1f1b", 1),
    "Interleaved1F1B": ("interleaved", 2),
    "ZBH1": ("zero_bubble", 1),
    "InterleavedZeroBubble": ("zero_bubble", 2),
    "ZBVZeroBubble": ("zbv", 1),
    "DualPipeV": ("dualpipev", 1),
}
_DEFAULT = ("", "ep={n}", "tp=2", "tp=2,ep={n}", "tp=2,ep={half}", "pp=2", "pp=2,ep={half}", "cp=2,ep={n}")


@dataclass(frozen=True)
class Contestant:
    """A layout over all devices, and the schedule of its pipeline if it has one."""

    layout: ParallelLayout
    schedule: str | None = None

    @property
    def name(self) -> str:
        return f"{self.layout} {self.schedule}" if self.schedule else str(self.layout)


def contestants_of(
    text: str,
    schedules: Sequence[str],
    config: da.DeepseekConfig,
    devices: int,
    batch: int,
    micro_batch: int,
    sequence: int,
) -> tuple[list[Contestant], list[str]]:
    """Returns the layouts to measure, and why others of them do not fit.

    Args:
        text: layouts such as "tp=2,ep=4; pp=2,ep=4"; empty for a choice of those that the devices allow.
        schedules: each pipeline runs with each of them.

    Raises:
        LayoutError: an axis is unknown, or none of the layouts fits.
    """
    chosen = [part for part in re.split(r"[;\s]+", text) if part]
    sizes = {"n": devices, "half": max(devices // 2, 1)}
    parts = chosen or list(dict.fromkeys(part.format(**sizes) for part in _DEFAULT))
    found: list[Contestant] = []
    problems: list[str] = []
    for part in parts:
        axes = parse_axes(part)
        try:
            layout = ParallelLayout(**axes).for_devices(devices)
            layout.validate(config, sequence=sequence)
            for schedule in schedules if layout.pp > 1 else (None,):
                contestant = Contestant(layout, schedule)
                _check(contestant, config, batch, micro_batch)
                if contestant not in found:
                    found.append(contestant)
        except LayoutError as error:
            problems.append(f"{part or 'data parallel'}: {error}")
    if not found:
        raise LayoutError(f"expected a layout that fits {devices} devices and {config.model_type}, got {problems}")
    return found, problems if chosen else []


def _check(contestant: Contestant, config: da.DeepseekConfig, batch: int, micro_batch: int) -> None:
    """Raises LayoutError for what would be refused later, and for a batch that cannot be cut."""
    layout = contestant.layout
    if batch % (layout.dp * micro_batch):
        raise LayoutError(f"expected dp x micro-batch = {layout.dp} x {micro_batch} to divide the batch of {batch}")
    if layout.cp > 1 and config.is_sparse_attention:
        raise LayoutError("expected cp = 1 for sparse attention")
    if contestant.schedule is not None:
        plan = plan_stages(config, layout, contestant.schedule)
        check_microbatches(plan, batch // (layout.dp * micro_batch))


def training_setup(
    contestant: Contestant, batch: int, micro_batch: int, sequence: int, recompute: bool, value_bytes: int
) -> TrainingSetup | None:
    """Returns the planner's settings of what is measured: weights, gradients and moments of one dtype, no master copy.

    None for GPipe, which the planner does not know. FSDP shares out weights, but not where a pipeline runs: there they
    stay gathered between micro-batches.
    """
    schedule, chunks = _SCHEDULES.get(contestant.schedule or "1F1B", (None, 1))
    if schedule is None:
        return None
    return TrainingSetup(
        batch=batch,
        sequence=sequence,
        micro_batch=micro_batch,
        schedule=schedule,
        chunks=chunks,
        zero=2 if contestant.schedule else 3,
        precision="bf16",
        recompute="full" if recompute else "none",
        weight_bytes=value_bytes,
        gradient_bytes=value_bytes,
        master_bytes=0,
        moment_bytes=value_bytes,
    )


def predicted_memory(
    config: da.DeepseekConfig, contestant: Contestant, setup: TrainingSetup, device: Device
) -> list[dict[str, int]]:
    """Returns the bytes by kind of a device of each pipeline rank, without those that the planner keeps in reserve."""
    layout, depth = contestant.layout, config.num_nextn_predict_layers
    stages = [range(config.num_hidden_layers)]
    if contestant.schedule is not None:
        stages = list(plan_stages(config, layout, contestant.schedule).layers)
    last = stages[-1]
    first = last.start if len(last) else config.num_hidden_layers
    stages[-1] = range(first, config.num_hidden_layers + depth)
    orders = schedule_operations(setup.schedule, layout.pp, setup.micro_batches(layout), setup.chunks)
    out = []
    for rank, order in enumerate(orders):
        memory = training_memory(config, layout, setup, device, stages, rank, order)
        out.append({kind: nbytes for kind, nbytes in memory.items() if kind != "reserved"})
    return out


def cut_config(config: da.DeepseekConfig, layers: int) -> da.DeepseekConfig:
    """Returns the config with so many layers, of which one at most is dense where experts would be left out."""
    dense = config.first_k_dense_replace
    changes: dict[str, object] = {"num_hidden_layers": layers}
    if dense is not None and dense >= layers:
        changes["first_k_dense_replace"] = min(1, layers - 1)
    return config.replace(**changes)


def config_within(
    config: da.DeepseekConfig, memory: float, chosen: Sequence[Contestant], setups: Sequence[TrainingSetup | None]
) -> da.DeepseekConfig:
    """Returns the config with the most layers whose plan is below `memory` bytes on every device of every layout.

    Raises:
        LayoutError: not even one layer (or as many as there are stages) fits.
    """
    device = DEVICES["h800"]  # only its reserve depends on it, which does not count here
    for layers in range(config.num_hidden_layers, 0, -1):
        cut = cut_config(config, layers)
        try:
            most = max(
                sum(each.values())
                for contestant, setup in zip(chosen, setups, strict=True)
                if setup is not None
                for each in predicted_memory(cut, contestant, setup, device)
            )
        except LayoutError:  # fewer layers than stages
            break
        if most <= memory:
            return cut
    raise LayoutError(
        f"expected layers that fit {memory / 1e9:.1f} GB a device, got none; give --layers or fewer stages"
    )
