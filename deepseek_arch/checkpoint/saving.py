"""`DeepseekLM` -> published safetensors: `save`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..config.argument_types import check_types
from ..parallel.agreement import on_ranks
from .files.progress import progress
from .files.writer import CheckpointWriter, parse_size, plan_shards
from .finite_values import NonFinite
from .save_plan import SaveReport, plan_save
from .sharded_saving import save_parts

__all__ = ["SaveReport", "save"]


@check_types
def save(model: nn.Module, path: str | Path, format: str = "bf16", max_shard_size: int | str = "5GB") -> SaveReport:
    """Writes a model in the published layout, which transformers and the serving engines read.

    Names are the published ones: one tensor for each expert, MTP modules at `num_hidden_layers + k`
    with their copies of the embedding and the head. Tensors are written one at a time. A checkpoint that is in the
    folder already is replaced when the new one is complete, and is as it was if anything fails; if the process is
    killed between the renames at the end, the next save to the folder puts it back first. Other files in the folder
    stay, but for a generation_config.json where `model.generation_config` has something.

    A model that is spread over ranks (`parallelize`, `pipeline`, FSDP2) is saved by all of them together: every rank
    calls this with the same folder, which all see, and writes files of its own. Experts are written where they are,
    and what is cut inside of a published tensor travels to its writer a few megabytes at a time. An error of one rank
    is raised on all; if one is killed, the others' next exchange fails, and the folder is as it was.

    Args:
        format: "bf16" writes all parameters as they are, unquantized: a bfloat16 model in bfloat16, a float32 model in
            float32, bit for bit (`torch_dtype` of config.json says which); FP8 layers are dequantized to the
            embedding's dtype. "fp8" writes FP8 layers bit for bit, codes and scales, and everything else of
            such a model as it is. In a model without any it rounds the projections and experts to FP8 blocks, as the
            published FP8 checkpoints do; router, norms, embedding, head and eh_proj stay as they are (TRAPS E7). Block
            size and scale format are the config's `quantization_config`, or 128 x 128 and float32.
        max_shard_size: bytes, or "5GB", "200MB" and so on; a larger tensor gets a shard of its own.

    Raises:
        ValueError: an argument is wrong, the model's tensors are not what its config says, another process is writing
            to the folder, or, for "fp8", a weight is not finite, or a scale negative or not finite.
        OSError: the disk is full, or the folder cannot be written.

    Warns:
        UserWarning: tensors have values that are not finite.
    """
    if format not in ("bf16", "fp8"):
        raise ValueError(f"expected format 'bf16' or 'fp8', got {format!r}")
    max_bytes = parse_size(max_shard_size)
    if on_ranks() and _is_spread(model):
        return save_parts(model, path, format == "fp8", max_bytes)
    plan = plan_save(model, format == "fp8")
    shards, not_finite = plan_shards(plan.groups, max_bytes), NonFinite()
    with CheckpointWriter(path, shards) as writer, progress(f"saving {writer.folder.name}", writer.nbytes) as bar:
        for slot, specs in zip(plan.slots, plan.groups, strict=True):
            tensors = plan.written(slot, specs, slot.of(plan.state), plan.scale_of(slot))
            for spec, tensor in zip(specs, tensors, strict=True):
                not_finite.check(spec.name, tensor)
                writer.write(spec.name, tensor)
            bar.update(sum(spec.nbytes for spec in specs))
        files = writer.commit(plan.config.to_dict(), (), plan.more)
    for message in not_finite.warnings:
        warnings.warn(f"{path}: {message}", stacklevel=3)  # past the decorator
    return plan.report(path, files, plan.groups)


def _is_spread(model: nn.Module) -> bool:
    """Returns True if this rank has a part of a model: of its parameters, or of its layers in a pipeline."""
    meshes: Any = getattr(model, "meshes", None)
    staged = meshes is not None and meshes.stages is not None
    return staged or any(hasattr(parameter, "placements") for parameter in model.parameters())
