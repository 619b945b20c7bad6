"""Memory and device hours of a recipe's stages, before anything is bought.

Rollouts are bound by decoding, training by a step of the planner's fastest layout that fits; dense models that the
planner does not know are counted by their parameters alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.deepseek_config import DeepseekConfig
from ..layout.accounting import count_parameters
from ..planning.devices import Device, find_device
from ..planning.inference import InferenceSetup
from ..planning.search import search_inference

__all__ = ["StagePlan", "plan_recipe"]

# Of a device's peak: what reinforcement and fine-tuning reach in published runs of models of this size.
UTILIZATION = 0.35
# Bytes a parameter that is trained: gradient, master copy and Adam's two moments in float32; its weight has two more.
TRAINED_BYTES = 16
SIZES = ("model", "parameters", "activated", "devices", "device", "prompt_tokens", "completion_tokens", "rows")


@dataclass(frozen=True)
class StagePlan:
    """Resources that a stage takes.

    Attributes:
        stage, kind: its name and kind.
        tokens: sampled and trained on.
        sampling_hours, training_hours: of devices, all of them together.
        memory: bytes of one device for weights, gradients and optimizer, shared evenly; activations and caches not.
    """

    stage: str
    kind: str
    tokens: float
    sampling_hours: float
    training_hours: float
    memory: float

    @property
    def hours(self) -> float:
        """Device hours."""
        return self.sampling_hours + self.training_hours


@dataclass(frozen=True)
class _Machine:
    """A model on devices: seconds of a device for a token sampled, and for a forward pass of one."""

    parameters: float
    devices: int
    decode_seconds: float
    forward_seconds: float
    prompt: float
    completion: float
    rows: float


def plan_recipe(stages: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Any]) -> list[StagePlan]:
    """Plans the stages of a recipe.

    Args:
        stages: their fields, as `Recipe.stages`.
        sizes: as `Recipe.plan`: `model`, a preset, or `parameters` and `activated` of a dense model; `devices`,
            `device`; mean `prompt_tokens` and `completion_tokens`; `rows` of data where no stage says how many.

    Raises:
        ValueError: a size that is unknown, missing or not positive.
    """
    machine = _machine(sizes)
    return [_plan(name, fields, machine, _rows(fields, stages) or machine.rows) for name, fields in stages.items()]


def _rows(fields: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Returns the rows that a stage trains on, where the recipe says how many are collected."""
    source = stages.get(str(fields.get("data_from")), {})
    most, ratio = source.get("max_rows"), source.get("general_ratio")
    return None if not most else float(most) * (1 + (1 / float(ratio) if ratio else 0))


def _machine(sizes: Mapping[str, Any]) -> _Machine:
    unknown = [name for name in sizes if name not in SIZES]
    if unknown or not ("model" in sizes or "parameters" in sizes):
        raise ValueError(
            f"expected a plan with model or parameters, and names among {', '.join(SIZES)}, got "
            f"{unknown[0] if unknown else 'neither'}"
        )
    for name in ("parameters", "activated", "devices", "prompt_tokens", "completion_tokens", "rows"):
        if not float(sizes.get(name, 1)) > 0:
            raise ValueError(f"expected {name} above 0 in a plan, got {sizes[name]}")
    device, devices = find_device(str(sizes.get("device", "H800"))), int(sizes.get("devices", 1))
    prompt, completion = float(sizes.get("prompt_tokens", 128)), float(sizes.get("completion_tokens", 1024))
    if "model" in sizes:
        config = DeepseekConfig.from_pretrained(str(sizes["model"]))
        counted = count_parameters(config)
        parameters, activated = float(counted.total), float(counted.activated)
        decode = _decode_seconds(config, devices, device, int(prompt + completion / 2))
    else:
        parameters = float(sizes["parameters"])
        activated = float(sizes.get("activated", parameters))
        # Enough rows decode together to be bound by computing.
        decode = 2 * activated / (UTILIZATION * device.peak_bf16)
    forward = 2 * activated / (UTILIZATION * device.peak_bf16)
    return _Machine(parameters, devices, decode, forward, prompt, completion, float(sizes.get("rows", 10_000)))


def _decode_seconds(config: DeepseekConfig, devices: int, device: Device, context: int) -> float:
    """Returns seconds of a device for one sampled token, in the planner's best layout that fits."""
    best = None
    for batch in (8, 32, 128):
        setup = InferenceSetup(batch=batch, context=context, precision="bf16")
        for plan in search_inference(config, devices, device, setup, top=1):
            if plan.fits and (best is None or plan.decode_tokens_per_second > best):
                best = plan.decode_tokens_per_second
    if best is None:
        raise ValueError(f"expected devices with the memory for {config.model_type}, got {devices} of {device.name}")
    return 1 / best


def _plan(name: str, fields: Mapping[str, Any], machine: _Machine, rows: float) -> StagePlan:
    kind, both = str(fields["kind"]), machine.prompt + machine.completion
    passes = {"sampled": 0.0, "trained": 0.0, "read": 0.0}  # completions
    if kind == "reinforce":
        group = int(fields.get("per_device_train_batch_size", 8)) * int(fields.get("gradient_accumulation_steps", 1))
        made = float(fields["max_steps"]) * group * machine.devices
        off_policy = int(fields.get("steps_per_generation", 1)) > int(fields.get("gradient_accumulation_steps", 1))
        passes = {"sampled": made, "trained": made, "read": made * (bool(fields.get("beta")) + off_policy)}
    elif kind == "collect":
        settings = fields.get("collect", {})
        passes["sampled"] = float(settings.get("problems", 1000)) * float(settings.get("samples", 4))
    elif kind in ("finetune", "judge"):
        examples = float(fields.get("examples", rows))
        passes["trained"] = examples * float(fields.get("num_train_epochs", 3)) * (2 if kind == "judge" else 1)
    sampling = passes["sampled"] * machine.completion * machine.decode_seconds
    # A training pass is three forward passes, with its activations computed again four.
    factor = 4 if fields.get("gradient_checkpointing", True) else 3
    training = (factor * passes["trained"] + passes["read"]) * both * machine.forward_seconds
    trains = kind not in ("collect",)
    adapters = fields.get("lora") is not None
    states = 0.0 if adapters or not trains else TRAINED_BYTES * machine.parameters
    copies = 2 if fields.get("beta") and not adapters else 1
    # Adapters leave a whole copy of the weights on each device, as data-parallel training does.
    shared = 1 if adapters else machine.devices
    memory = copies * 2 * machine.parameters / shared + states / machine.devices
    tokens = (passes["sampled"] + passes["trained"]) * machine.completion
    return StagePlan(name, kind, tokens, sampling / 3600, training / 3600, memory)
