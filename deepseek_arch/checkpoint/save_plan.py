"""Plan of a save: each tensor of a model as it stands in the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import TensorSlot, scale_name
from ..layout.published_tensors import TensorSpec
from ..quant.fp8_blocks import (
    FP8_QUANTIZATION,
    block_grid,
    decode_scale,
    dequantize_blocks,
    quantize_blocks,
    scale_format_of,
)
from .checked_model import CheckedModel, StoredKinds, check_model
from .files.reader import DTYPE_NAMES, DTYPES

__all__ = ["SavePlan", "SaveReport", "plan_files", "plan_save"]


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

    def report(self, path: str | Path, files: list[Path], groups: Sequence[Sequence[TensorSpec]]) -> SaveReport:
        """Returns what was written: `groups`, of all ranks."""
        specs = [spec for group in groups for spec in group]
        quantized = sum(len(group) == 2 for group in groups)
        return SaveReport(
            Path(path), self.config, tuple(files), len(specs), sum(spec.nbytes for spec in specs), quantized
        )


def plan_save(model: nn.Module, fp8: bool) -> SavePlan:
    """Plans the files of a model on one process.

    Args:
        fp8: FP8 layers stay in FP8, and projections and experts of a model without any are quantized.

    Raises:
        ValueError: the model's tensors are not what its config says.
    """
    checked = check_model(model)
    return plan_files(checked, checked.kinds, fp8)


def plan_files(checked: CheckedModel, kinds: StoredKinds, fp8: bool) -> SavePlan:
    """Plans the files of a model.

    Args:
        kinds: of the whole model.
        fp8: as in `plan_save`.

    Raises:
        ValueError: FP8 layers have several block sizes.
    """
    if len(kinds.block_sizes) > 1:
        raise ValueError(f"expected one block size in all FP8 layers, got {sorted(kinds.block_sizes)}")
    fp8_weights = FP8Weights(checked.fp8_parameters, next(iter(kinds.block_sizes), (128, 128)))
    config = _saved_config(checked.config, kinds, fp8)
    slots = [slot for slot in checked.slots if not _is_tied_head(slot, config)]
    groups = [_specs(slot, checked, kinds, config.weight_block_size) for slot in slots]
    return SavePlan(checked.state, config, fp8_weights, slots, groups, checked.more)


def _is_tied_head(slot: TensorSlot, config: DeepseekConfig) -> bool:
    return slot.name == "lm_head.weight" and config.tie_word_embeddings


def _saved_config(config: DeepseekConfig, kinds: StoredKinds, fp8: bool) -> DeepseekConfig:
    """Returns the config of the written files; without FP8 tensors it has no `quantization_config` (TRAPS E12)."""
    # One word for all parameters: the widest, so that reading them back loses nothing.
    widest, *others = kinds.dtypes
    for dtype in others:
        widest = torch.promote_types(widest, dtype)
    quantization = None
    if fp8 and kinds.block_sizes == {config.weight_block_size}:
        quantization = config.quantization_config
    elif fp8:
        given = config.quantization_config if config.weight_block_size else {}
        quantization = {**FP8_QUANTIZATION, **{k: v for k, v in (given or {}).items() if v is not None}}
        for block_size in kinds.block_sizes:
            quantization["weight_block_size"] = list(block_size)
    return config.replace(dtype=str(widest), quantization_config=quantization)


def _specs(
    slot: TensorSlot, checked: CheckedModel, kinds: StoredKinds, block_size: tuple[int, int] | None
) -> list[TensorSpec]:
    """Returns the tensors to write for a slot: codes and scales, or values. Without a `block_size` nothing is FP8."""
    has_codes = slot.parameter in checked.fp8_parameters
    if (has_codes if kinds.block_sizes else slot.fp8) and block_size is not None:
        scale = TensorSpec(scale_name(slot.name), "F32", block_grid(slot.shape, block_size))
        return [TensorSpec(slot.name, "F8_E4M3", slot.shape), scale]
    dtype = kinds.embedding if has_codes else checked.state[slot.parameter].dtype
    assert dtype is not None  # one of the stages has the embedding
    dtype = torch.promote_types(dtype, torch.float32) if slot.float32 else dtype
    return [TensorSpec(slot.name, DTYPE_NAMES[dtype], slot.shape)]


def _check_scales(name: str, scale: Tensor) -> None:
    """Raises ValueError for scales that `load` would refuse."""
    try:
        decode_scale(scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
