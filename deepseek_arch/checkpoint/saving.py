"""`DeepseekLM` -> published safetensors: `save`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import TensorSlot, layout, scale_name
from ..layout.published_tensors import TensorSpec
from ..moe.adapter_state import biases_in_adapters
from ..quant.fp8_blocks import (
    FP8_QUANTIZATION,
    block_grid,
    decode_scale,
    dequantize_blocks,
    quantize_blocks,
    scale_format_of,
)
from ..quant.fp8_convert import fp8_layers
from .files.progress import progress
from .files.reader import DTYPE_NAMES, DTYPES
from .files.shards import GENERATION_CONFIG_NAME
from .files.writer import CheckpointWriter, parse_size, plan_shards
from .finite_values import NonFinite

__all__ = ["FP8_QUANTIZATION", "SaveReport", "save"]


@dataclass(frozen=True)
class SaveReport:
    """Outcome of `save` and `slice_checkpoint`.

    Attributes:
        files: the shards, their index and config.json, and companions such as a tokenizer.
        tensors: number of tensors, FP8 scales and repeated embeddings included; nbytes: their bytes.
        quantized: number of FP8 tensors.
    """

    path: Path
    config: DeepseekConfig
    files: tuple[Path, ...]
    tensors: int
    nbytes: int
    quantized: int

    def __str__(self) -> str:
        fp8 = f", {self.quantized:,} in FP8" if self.quantized else ""
        return f"{self.tensors:,} tensors, {self.nbytes:,} bytes in {len(self.files)} files at {self.path}{fp8}"


@check_types
def save(model: nn.Module, path: str | Path, format: str = "bf16", max_shard_size: int | str = "5GB") -> SaveReport:
    """Writes a model in the published layout, which transformers and the serving engines read.

    Names are the published ones: one tensor for each expert, MTP modules at `num_hidden_layers + k`
    with their copies of the embedding and the head. Tensors are written one at a time. A checkpoint that is in the
    folder already is replaced when the new one is complete, and is as it was if anything fails; if the process is
    killed between the renames at the end, the next save to the folder puts it back first. Other files in the folder
    stay, but for a generation_config.json where `model.generation_config` has something.

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
    state, config, fp8_weights = _check_model(model)
    config = _saved_config(config, state, fp8_weights, fp8=format == "fp8")
    slots = [slot for slot in layout(config) if not _is_tied_head(slot, config)]
    groups = [_specs(slot, state, fp8_weights, config.weight_block_size) for slot in slots]
    shards = plan_shards(groups, max_bytes)
    not_finite, defaults = NonFinite(), _generation_config(model)
    with CheckpointWriter(path, shards) as writer, progress(f"saving {writer.folder.name}", writer.nbytes) as bar:
        for slot, group in zip(slots, groups, strict=True):
            for spec, tensor in zip(group, _tensors(slot, state, fp8_weights, config, group), strict=True):
                not_finite.check(spec.name, tensor)
                writer.write(spec.name, tensor)
            bar.update(sum(spec.nbytes for spec in group))
        files = writer.commit(config.to_dict(), (), {GENERATION_CONFIG_NAME: defaults} if defaults else {})
    for message in not_finite.warnings:
        warnings.warn(f"{path}: {message}", stacklevel=3)  # past the decorator
    tensors, quantized = sum(len(group) for group in groups), sum(len(group) == 2 for group in groups)
    return SaveReport(Path(path), config, tuple(files), tensors, writer.nbytes, quantized)


def _generation_config(model: nn.Module) -> dict[str, Any]:
    """Returns `model.generation_config` as JSON holds it; {} where the model has none, or one of another kind."""
    defaults = getattr(model, "generation_config", None)
    if not isinstance(defaults, Mapping):
        return {}
    try:
        copy = json.loads(json.dumps(dict(defaults)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected model.generation_config to hold what JSON can hold: {error}") from None
    return copy


def _is_tied_head(slot: TensorSlot, config: DeepseekConfig) -> bool:
    return slot.name == "lm_head.weight" and config.tie_word_embeddings


@dataclass(frozen=True)
class _FP8Weights:
    """FP8 weights of a model: state dict entries of codes, and the block size that all of them have."""

    parameters: frozenset[str]
    block_size: tuple[int, int]


def _fp8_weights_of(model: nn.Module) -> _FP8Weights:
    layers = fp8_layers(model)
    blocks = {layer.block_size for layer in layers.values()}
    if len(blocks) > 1:
        raise ValueError(f"expected one block size in all FP8 layers, got {sorted(blocks)}")
    names = frozenset(f"{path}.{name}" for path, layer in layers.items() for name in layer.quantized_params)
    return _FP8Weights(names, blocks.pop() if blocks else (128, 128))


def _check_model(model: nn.Module) -> tuple[dict[str, Tensor], DeepseekConfig, _FP8Weights]:
    config = getattr(model, "config", None)
    if not isinstance(config, DeepseekConfig):
        raise ValueError(f"expected a DeepseekLM, got {type(model).__name__}")
    with biases_in_adapters(model, False):  # adapters that were merged since had their own names for them
        state = model.state_dict()
    slots, fp8_weights = list(layout(config)), _fp8_weights_of(model)
    wrong = []
    for slot in slots:
        tensor = state.get(slot.parameter)
        if tensor is None:
            wrong.append(f"{slot.parameter}: expected {list(slot.shape)} for {slot.name}, got None")
        elif slot.of(state).shape != slot.shape:
            shape = list(slot.of(state).shape)
            wrong.append(f"{slot.parameter}: expected {list(slot.shape)} for {slot.name}, got {shape}")
        elif tensor.is_meta:
            wrong.append(f"{slot.parameter}: expected a tensor with memory, got one on device meta")
        elif type(tensor) not in (Tensor, nn.Parameter):
            wrong.append(f"{slot.parameter}: expected a plain tensor, got a {type(tensor).__name__} (gather it first)")
        elif tensor.dtype == torch.float8_e4m3fn and slot.parameter not in fp8_weights.parameters:
            wrong.append(f"{slot.parameter}: expected FP8 codes in an FP8Linear or FP8Experts, got them without scales")
    known = {slot.parameter for slot in slots} | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    known |= {scale_name(name) for name in fp8_weights.parameters}
    unknown = sorted(set(state) - known)
    wrong += [f"{name}: not a parameter of this model (merge adapters first)" for name in unknown]
    if wrong:
        raise ValueError("expected the parameters that the model's config describes: " + "; ".join(wrong[:5]))
    return state, config, fp8_weights


def _saved_config(
    config: DeepseekConfig, state: dict[str, Tensor], fp8_weights: _FP8Weights, fp8: bool
) -> DeepseekConfig:
    """Returns the config of the written files; without FP8 tensors it has no `quantization_config` (TRAPS E12)."""
    codes_and_scales = fp8_weights.parameters | {scale_name(name) for name in fp8_weights.parameters}
    ordinary = {name: t for name, t in state.items() if name not in codes_and_scales}
    dtypes = {tensor.dtype for name, tensor in ordinary.items() if not name.endswith(".e_score_correction_bias")}
    # One word for all parameters: the widest, so that reading them back loses nothing.
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    quantization = None
    if fp8 and fp8_weights.parameters and config.weight_block_size == fp8_weights.block_size:
        quantization = config.quantization_config
    elif fp8:
        given = config.quantization_config if config.weight_block_size else {}
        quantization = {**FP8_QUANTIZATION, **{k: v for k, v in (given or {}).items() if v is not None}}
        if fp8_weights.parameters:
            quantization["weight_block_size"] = list(fp8_weights.block_size)
    return config.replace(dtype=str(widest), quantization_config=quantization)


def _specs(
    slot: TensorSlot, state: dict[str, Tensor], fp8_weights: _FP8Weights, block_size: tuple[int, int] | None
) -> list[TensorSpec]:
    """Returns the tensors to write for a slot: codes and scales, or values. Without a `block_size` nothing is FP8."""
    in_fp8 = slot.parameter in fp8_weights.parameters if fp8_weights.parameters else slot.fp8
    if in_fp8 and block_size is not None:
        scale = TensorSpec(scale_name(slot.name), "F32", block_grid(slot.shape, block_size))
        return [TensorSpec(slot.name, "F8_E4M3", slot.shape), scale]
    source = "model.embed_tokens.weight" if slot.parameter in fp8_weights.parameters else slot.parameter
    dtype = state[source].dtype
    dtype = torch.promote_types(dtype, torch.float32) if slot.float32 else dtype
    return [TensorSpec(slot.name, DTYPE_NAMES[dtype], slot.shape)]


def _tensors(
    slot: TensorSlot,
    state: dict[str, Tensor],
    fp8_weights: _FP8Weights,
    config: DeepseekConfig,
    specs: list[TensorSpec],
) -> tuple[Tensor, ...]:
    """Returns the values of `_specs`."""
    tensor = slot.of(state)
    if slot.parameter in fp8_weights.parameters:
        scale = slot.scale_of(state, fp8_weights.block_size[0])
        if len(specs) == 2:
            _check_scales(scale_name(slot.name), scale)
            return tensor, scale
        return (dequantize_blocks(tensor, scale, fp8_weights.block_size, DTYPES[specs[0].dtype]),)
    if len(specs) == 1:
        return (tensor.to(DTYPES[specs[0].dtype]),)
    assert config.quantization_config is not None and config.weight_block_size is not None
    try:
        return quantize_blocks(tensor, config.weight_block_size, scale_format_of(config.quantization_config))
    except ValueError as error:
        raise ValueError(f"{slot.name}: {error}") from None


def _check_scales(name: str, scale: Tensor) -> None:
    """Raises ValueError for scales that `load` would refuse."""
    try:
        decode_scale(scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
