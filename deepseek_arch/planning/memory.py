"""Bytes that a device holds at the peak of a training step, by kind."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import ParallelLayout
from .costs import LOSS_ROWS, deferred_bytes, kept_bytes, working_bytes
from .devices import RESERVED, Device
from .schedules import Operation, rank_stages
from .setup import TrainingSetup
from .shards import Parameter, end_parameters, layer_parameters, per_layer, sharded_elements
from .simulation import peak_live

__all__ = ["training_memory"]


def training_memory(
    config: DeepseekConfig,
    layout: ParallelLayout,
    setup: TrainingSetup,
    device: Device,
    stages: Sequence[range],
    pp_rank: int,
    operations: Sequence[Operation],
) -> dict[str, int]:
    """Returns the bytes of one device of pipeline rank `pp_rank`, the first of its shards.

    weights, gradients, optimizer: of the parameters of the stages it holds, cut as `setup.zero` says; gathered: one
    layer's whole weights and gradients where they are cut; activations: the most that the schedule keeps for backward
    passes; working: what one layer's backward pass needs for a moment; logits: of one chunk of the loss, with the
    gradient of its input; reserved: 5 % of the device, for the runtime and fragmentation.

    Args:
        stages: the layers of every stage; operations: of this rank.
    """
    held = rank_stages(setup.schedule, layout.pp, pp_rank, setup.chunks)
    layers = sorted({layer_idx for stage in held for layer_idx in stages[stage]})
    first, last = 0 in held, len(stages) - 1 in held
    parameters = per_layer(config, lambda i: layer_parameters(config, i, layout))
    ends = end_parameters(config, layout, first, last)
    everything = [*ends, *(parameter for i in layers for parameter in parameters[i])]
    rank = pp_rank * layout.dp_replicate * layout.dense_ranks
    out = _parameter_bytes(config, layout, setup, everything, rank)
    largest = max((parameters[i] for i in layers), key=_elements, default=[])
    gathered = (setup.weight_bytes if setup.zero == 3 else 0) + (setup.gradient_bytes if setup.zero >= 2 else 0)
    # Two layers' weights: the one that computes and the one that is being gathered.
    out["gathered"] = _elements(largest) * (gathered + (setup.weight_bytes if setup.zero == 3 else 0))
    kept = per_layer(config, lambda i: sum(kept_bytes(config, i, layout, setup).values()))
    by_stage = [sum(kept[i] for i in stage) for stage in stages]
    head = 2 * 2 * setup.tokens(layout) * config.hidden_size * (1 + config.num_nextn_predict_layers)
    by_stage[-1] += head
    deferred = per_layer(config, lambda i: deferred_bytes(config, i, layout, setup))
    between = [sum(deferred[i] for i in stage) for stage in stages]
    out["activations"] = round(peak_live(operations, by_stage.__getitem__, between.__getitem__))
    working = per_layer(config, lambda i: working_bytes(config, i, layout, setup))
    out["working"] = round(max((working[i] for i in layers), default=0.0))
    rows = min(LOSS_ROWS, setup.tokens(layout))
    out["logits"] = 4 * rows * config.vocab_size // layout.tp if last else 0
    out["reserved"] = round(RESERVED * device.memory)
    return out


def _elements(parameters: Sequence[Parameter]) -> int:
    return sum(parameter.elements for parameter in parameters)


def _parameter_bytes(
    config: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, parameters: list[Parameter], rank: int
) -> dict[str, int]:
    """Returns bytes of weights, gradients and optimizer states; buffers are float32 weights without the other two."""
    trained = [parameter for parameter in parameters if parameter.kind != "float32"]
    whole = _elements(trained)
    cut = sum(sharded_elements(config, layout, trained, rank))
    buffers = 4 * (_elements(parameters) - whole)
    return {
        "weights": setup.weight_bytes * (cut if setup.zero == 3 else whole) + buffers,
        "gradients": setup.gradient_bytes * (whole if setup.zero == 1 else cut),
        "optimizer": (setup.master_bytes + 2 * setup.moment_bytes) * cut,
    }
