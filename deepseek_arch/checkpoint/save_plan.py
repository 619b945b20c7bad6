"""Plan of a save: the model's tensors compared with its config, and each as it stands in the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from .files.reader import DTYPE_NAMES, DTYPES
from .files.shards import GENERATION_CONFIG_NAME

__all__ = ["SavePlan", "SaveReport", "plan_save"]


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


@dataclass(frozen=True)
class FP8Weights:
    """FP8 weights of a model: state dict entries of codes, and the block size that all of them have."""

    parameters: frozenset[str]
    block_size: tuple[int, int]


@dataclass(frozen=True)
class SavePlan:
    """Tensors of a model as they are to be written.

    Attributes:
        state: the model's; config: of the files.
        slots: published tensors to write; groups: what stands in the files for each: values, or codes and scales.
        more: content of further JSON files.
    """

    state: dict[str, Tensor]
    config: DeepseekConfig
    fp8_weights: FP8Weights
    slots: list[TensorSlot]
    groups: list[list[TensorSpec]]
    more: dict[str, dict[str, Any]]

    def has_codes(self, slot: TensorSlot) -> bool:
        """Returns True if the model holds a published tensor in FP8."""
        return slot.parameter in self.fp8_weights.parameters

    def scale_of(self, slot: TensorSlot) -> Tensor | None:
        """Returns the model's scales of a published tensor, None where it holds values."""
        return slot.scale_of(self.state, self.fp8_weights.block_size[0]) if self.has_codes(slot) else None

    def written(
        self, slot: TensorSlot, specs: list[TensorSpec], tensor: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns the values of `specs`.

        Args:
            tensor: of the model, whole, or rows from a block's border on.
            scale: of the same rows.

        Raises:
            ValueError: values to be quantized are not finite, or scales are negative or not finite.
        """
        if scale is not None:
            if len(specs) == 2:
                _check_scales(scale_name(slot.name), scale)
                return tensor, scale
            return (dequantize_blocks(tensor, scale, self.fp8_weights.block_size, DTYPES[specs[0].dtype]),)
        if len(specs) == 1:
            return (tensor.to(DTYPES[specs[0].dtype]),)
        assert self.config.quantization_config is not None and self.config.weight_block_size is not None
        try:
            block_size, scale_format = self.config.weight_block_size, scale_format_of(self.config.quantization_config)
            return quantize_blocks(tensor, block_size, scale_format)
        except ValueError as error:
            raise ValueError(f"{slot.name}: {error}") from None

    def report(self, path: str | Path, files: list[Path]) -> SaveReport:
        """Returns what was written."""
        specs = [spec for group in self.groups for spec in group]
        quantized = sum(len(group) == 2 for group in self.groups)
        return SaveReport(
            Path(path), self.config, tuple(files), len(specs), sum(spec.nbytes for spec in specs), quantized
        )


def plan_save(model: nn.Module, fp8: bool, cut: bool = False) -> SavePlan:
    """Plans the files of a model.

    Args:
        cut: its parameters may be spread over the ranks that run.
        fp8: FP8 layers stay in FP8, and projections and experts of a model without any are quantized.

    Raises:
        ValueError: the model's tensors are not what its config says.
    """
    state, config, fp8_weights = _check_model(model, cut)
    config = _saved_config(config, state, fp8_weights, fp8)
    slots = [slot for slot in layout(config) if not _is_tied_head(slot, config)]
    groups = [_specs(slot, state, fp8_weights, config.weight_block_size) for slot in slots]
    defaults = _generation_config(model)
    return SavePlan(state, config, fp8_weights, slots, groups, {GENERATION_CONFIG_NAME: defaults} if defaults else {})


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


def _fp8_weights_of(model: nn.Module) -> FP8Weights:
    layers = fp8_layers(model)
    blocks = {layer.block_size for layer in layers.values()}
    if len(blocks) > 1:
        raise ValueError(f"expected one block size in all FP8 layers, got {sorted(blocks)}")
    names = frozenset(f"{path}.{name}" for path, layer in layers.items() for name in layer.quantized_params)
    return FP8Weights(names, blocks.pop() if blocks else (128, 128))


def _check_model(model: nn.Module, cut: bool) -> tuple[dict[str, Tensor], DeepseekConfig, FP8Weights]:
    config = getattr(model, "config", None)
    if not isinstance(config, DeepseekConfig):
        raise ValueError(f"expected a DeepseekLM, got {type(model).__name__}")
    meshes: Any = getattr(model, "meshes", None)
    if meshes is not None and meshes.stages is not None:
        raise ValueError("expected a whole model, got one of the stages of a pipeline, which save_sharded writes")
    with biases_in_adapters(model, False):  # adapters that were merged since had their own names for them
        state = model.state_dict()
    slots, fp8_weights = list(layout(config)), _fp8_weights_of(model)
    wrong = []
    for slot in slots:
        tensor = state.get(slot.parameter)
        if tensor is None:
            wrong.append(f"{slot.parameter}: expected {list(slot.shape)} for {slot.name}, got None")
        elif (shape := _shape(slot, tensor)) != slot.shape:
            wrong.append(f"{slot.parameter}: expected {list(slot.shape)} for {slot.name}, got {list(shape)}")
        elif tensor.is_meta:
            wrong.append(f"{slot.parameter}: expected a tensor with memory, got one on device meta")
        elif type(tensor) not in (Tensor, nn.Parameter) and not (cut and hasattr(tensor, "placements")):
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


def _shape(slot: TensorSlot, tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of a published tensor in its parameter; the parameter's own where it has no room for it."""
    if slot.index is None or tensor.ndim != 3 or slot.index[0] >= tensor.shape[0] or slot.index[2] > tensor.shape[1]:
        return tuple(tensor.shape)
    return slot.index[2] - slot.index[1], tensor.shape[2]


def _saved_config(
    config: DeepseekConfig, state: dict[str, Tensor], fp8_weights: FP8Weights, fp8: bool
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
    slot: TensorSlot, state: dict[str, Tensor], fp8_weights: FP8Weights, block_size: tuple[int, int] | None
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


def _check_scales(name: str, scale: Tensor) -> None:
    """Raises ValueError for scales that `load` would refuse."""
    try:
        decode_scale(scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
