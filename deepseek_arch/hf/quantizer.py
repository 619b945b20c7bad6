"""Reading published FP8 checkpoints through transformers: exact dequantization by the config's block size.

transformers (5.17 to 5.23) infers the block from `rows // scale_rows`, which fails, or is silently wrong, for any
matrix whose last block is partial. Our quantizer goes under a method name of its own, which our configs put in place
of "fp8" in memory, so that other models' FP8 is read as ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.reader import read_header
from ..fp8 import dequantize_blocks

__all__ = ["FP8_METHOD", "PUBLISHED_METHOD", "DeepseekFP8Config", "DeepseekFP8Quantizer"]

FP8_METHOD = "deepseek_fp8"
PUBLISHED_METHOD = "fp8"
_WEIGHT = "weight(?!_scale_inv)"  # without the lookahead, transformers 5.17 also matches the scale's name
_SUFFIX = "_scale_inv"
_SCALE = "weight" + _SUFFIX


@register_quantization_config(FP8_METHOD)
class DeepseekFP8Config(QuantizationConfigMixin):
    """The published `quantization_config`: the block size, and whatever else the file says, kept for saving."""

    def __init__(self, weight_block_size: tuple[int, int] | list[int] | None = None, **published: Any) -> None:
        published.pop("quant_method", None)
        self.quant_method = FP8_METHOD
        self.weight_block_size = list(weight_block_size or (128, 128))
        self.dequantize = True  # tells transformers that the loaded model is an ordinary one
        self.published = published

    @property
    def blocks(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        rows, columns = self.weight_block_size
        return rows, columns

    def to_dict(self) -> dict[str, Any]:
        """The published layout."""
        return {**self.published, "quant_method": PUBLISHED_METHOD, "weight_block_size": self.weight_block_size}


@register_quantizer(FP8_METHOD)
class DeepseekFP8Quantizer(HfQuantizer):
    """Puts dequantization in front of the weight conversions; the model itself is built as for any checkpoint."""

    quantization_config: DeepseekFP8Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(f"expected a checkpoint in FP8 for {FP8_METHOD}, got one without a quantization_config")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Compares the tensors in the files: transformers 5.17 casts codes before anyone could miss their scales."""
        tensors = {}
        for file in checkpoint_files or ():
            if file.endswith(".safetensors"):
                tensors.update(read_header(Path(file)))
        codes = [name for name, info in tensors.items() if info.dtype == "F8_E4M3"]
        without = [name for name in codes if f"{name}{_SUFFIX}" not in tensors]
        if without:
            raise ValueError(f"expected a scale beside each FP8 tensor, got none for {', '.join(sorted(without))}")
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """transformers 5.17 calls this without the model."""
        merged = [
            _with_dequantization(entry, self)
            if isinstance(entry, WeightConverter) and all(p.endswith(_WEIGHT) for p in entry.source_patterns)
            else entry
            for entry in weight_conversions
        ]
        return [*merged, WeightConverter([_WEIGHT, _SCALE], "weight", [DequantizeBlocks(self), FitParameter()])]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _with_dequantization(converter: WeightConverter, quantizer: DeepseekFP8Quantizer) -> WeightConverter:
    """The same conversion of the same tensors, which now come as codes and scales."""
    sources = [name for pattern in converter.source_patterns for name in (pattern, _scale_name(pattern))]
    operations = [DequantizeBlocks(quantizer), *converter.operations, FitParameter()]
    copy = WeightConverter(sources, list(converter.target_patterns), operations)
    copy.scope_prefix, copy.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return copy


def _scale_name(pattern: str) -> str:
    return pattern.removesuffix(_WEIGHT) + _SCALE


class DequantizeBlocks(ConversionOps):
    """Codes and scales -> values in the parameter's dtype.

    Tensors that are not FP8 and come without scales (the router, norms, embeddings) are only cast.
    """

    def __init__(self, hf_quantizer: DeepseekFP8Quantizer) -> None:
        # By this name transformers 5.23 knows that the tensors must reach this operation as they are on disk.
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Raises ValueError for codes without scales, scales without codes, or scales that do not fit."""
        dtype = _tensor_named(model, full_layer_name).dtype
        out: dict[str, Any] = {}
        for pattern in source_patterns:
            if pattern.endswith(_SCALE) or pattern not in input_dict:
                continue
            codes = _as_list(input_dict.pop(pattern))
            scales = _as_list(input_dict.pop(_scale_name(pattern), []))
            if scales and len(scales) != len(codes):
                raise ValueError(
                    f"{full_layer_name}: expected one scale for each FP8 tensor, got {len(codes)} tensors and "
                    f"{len(scales)} scales"
                )
            pairs = zip(codes, scales or [None] * len(codes), strict=True)
            out[pattern] = [self._value(code, scale, dtype, full_layer_name) for code, scale in pairs]
        if input_dict:
            raise ValueError(f"{full_layer_name}: expected FP8 tensors beside the scales, got scales alone")
        return out

    def _value(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype, name: str) -> Tensor:
        if scale is None:
            if codes.dtype == torch.float8_e4m3fn:
                raise ValueError(f"{name}: expected a scale beside the FP8 tensor, got none")
            return codes.to(dtype)
        if codes.dtype != torch.float8_e4m3fn:
            # transformers 5.17 has cast them already, as it does ordinary tensors; codes fit wider floats exactly.
            narrow = codes.to(torch.float8_e4m3fn)
            if not torch.equal(narrow.to(codes.dtype), codes):
                raise ValueError(f"{name}: expected FP8 codes beside the scale, got other values in {codes.dtype}")
            codes = narrow
        return dequantize_blocks(codes, scale, self.hf_quantizer.quantization_config.blocks, dtype)


class FitParameter(ConversionOps):
    """The last step: one tensor of the parameter's shape, which transformers 5.17 does not check in quantized files."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Raises ValueError for another shape."""
        (value,) = input_dict.values()
        (tensor,) = _as_list(value)
        expected = _tensor_named(model, full_layer_name)
        if type(expected) in (Tensor, torch.nn.Parameter) and tensor.shape != expected.shape:
            raise ValueError(f"{full_layer_name}: expected shape {list(expected.shape)}, got {list(tensor.shape)}")
        return {full_layer_name: tensor}


def _as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def _tensor_named(model: PreTrainedModel, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)
