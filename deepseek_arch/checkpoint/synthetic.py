"""Checkpoints in the published layout with random weights, for demonstrations, tests and benchmarks.

Written tensor by tensor, without building a model, so that a checkpoint may be larger than memory.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import TensorSlot, layout, scale_name
from ..layout.published_tensors import TensorSpec
from ..quant.fp8_blocks import FP8_QUANTIZATION, block_grid, dequantize_blocks, quantize_blocks
from .files.writer import CheckpointWriter, shard_names
from .save_plan import SaveReport

__all__ = ["write_checkpoint"]


def write_checkpoint(
    path: str | Path,
    config: DeepseekConfig,
    format: str = "fp8",
    *,
    seed: int = 0,
    shards: int = 4,
    std: float | None = None,
) -> SaveReport:
    """Writes random weights for `config` as its authors would publish them.

    As in the published files, MTP modules come last and repeat the embedding and the head, router
    biases are float32, and everything but projections and experts stays unquantized. Some FP8 tensors have their
    scales in another shard, which the layout allows.

    Args:
        format: "fp8", or "bf16" for what dequantizing the "fp8" checkpoint of the same seed gives: the two mean the
            same model, bit for bit.
        seed: of all values; each tensor's values depend on it and on the tensor's name alone.
        shards: number of files.
        std: of the weights; default `config.initializer_range`.

    Raises:
        ValueError: an unknown format, or fewer tensors than shards.
    """
    if format not in ("bf16", "fp8"):
        raise ValueError(f"expected format 'bf16' or 'fp8', got {format!r}")
    quantization = {**FP8_QUANTIZATION, **(config.quantization_config or {})}
    quantized = config.replace(quantization_config=quantization, dtype="bfloat16")
    written = quantized if format == "fp8" else quantized.replace(quantization_config=None)
    block_size = quantized.weight_block_size or (128, 128)
    std = config.initializer_range if std is None else std
    slots = [slot for slot in layout(config) if not (slot.name == "lm_head.weight" and slot.repeats)]
    specs = [_specs(slot, block_size, format) for slot in slots]
    files = _distribute(specs, shards)
    with CheckpointWriter(path, files, shard_names(shards)) as writer:
        for slot in slots:
            weight = _random(slot, seed, std)
            if slot.fp8:
                codes, scale = quantize_blocks(weight, block_size, quantization.get("scale_fmt"))
                if format == "fp8":
                    writer.write(slot.name, codes)
                    writer.write(scale_name(slot.name), scale)
                else:
                    writer.write(slot.name, dequantize_blocks(codes, scale, block_size, torch.bfloat16))
            else:
                writer.write(slot.name, weight)
        paths = writer.commit(written.to_dict())
    count = sum(len(group) for group in specs)
    return SaveReport(Path(path), written, tuple(paths), count, writer.nbytes, sum(len(g) == 2 for g in specs))


def _specs(slot: TensorSlot, block_size: tuple[int, int], format: str) -> list[TensorSpec]:
    if slot.float32:
        return [TensorSpec(slot.name, "F32", slot.shape)]
    if not slot.fp8 or format == "bf16":
        return [TensorSpec(slot.name, "BF16", slot.shape)]
    scale = TensorSpec(scale_name(slot.name), "F32", block_grid(slot.shape, block_size))
    return [TensorSpec(slot.name, "F8_E4M3", slot.shape), scale]


def _random(slot: TensorSlot, seed: int, std: float) -> Tensor:
    # A repeated tensor is drawn under the name of what it repeats.
    name = slot.parameter if slot.repeats else slot.name
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(slot.shape, generator=generator, device="cpu", dtype=torch.float32)
    if name.endswith(".e_score_correction_bias"):
        return noise * 0.1  # both signs, large enough to change which experts are chosen
    if len(slot.shape) == 1:  # norms, in values of bfloat16 also where they are stored in float32
        values = (noise * 0.1 + (not name.endswith(".bias"))).bfloat16()
        return values.float() if slot.float32 else values
    return (noise * std).bfloat16()


def _distribute(groups: list[list[TensorSpec]], shards: int) -> list[list[TensorSpec]]:
    """Exactly `shards` files of about equal size, in order; every eighth scale moves on to the next file."""
    total = sum(spec.nbytes for group in groups for spec in group)
    if not 1 <= shards <= len(groups):
        raise ValueError(f"expected between 1 and {len(groups)} shards, got {shards}")
    files: list[list[TensorSpec]] = [[] for _ in range(shards)]
    filled = 0
    for i, group in enumerate(groups):
        # Every file gets at least one tensor, however large the first ones are.
        current = min(filled * shards // total, i, shards - 1)
        current = max(current, shards - (len(groups) - i))
        files[current].append(group[0])
        for scale in group[1:]:
            files[(current + (i % 8 == 0)) % shards].append(scale)
        filled += sum(spec.nbytes for spec in group)
    return files
