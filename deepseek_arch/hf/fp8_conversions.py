"""Conversions of FP8 tensors while transformers loads them: values and scales as stored, decoded, or dequantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer

from ..layout.parameter_map import scale_name
from ..quant.fp8_blocks import decode_scale, dequantize_blocks
from .fp8_config import DeepseekFP8Config

__all__ = [
    "SCALE",
    "WEIGHT",
    "DecodeScales",
    "DequantizeBlocks",
    "FitParameter",
    "dequantizing_converter",
    "fp8_converters",
]

WEIGHT = "weight(?!_scale_inv)"  # without the lookahead, transformers 5.17 also matches the scale's name
SCALE = scale_name("weight")


def fp8_converters(converter: WeightConverter, quantizer: HfQuantizer) -> list[WeightConverter]:
    """Returns the conversion twice: of the weights, FP8 or not, and of the scales into the parameter beside theirs."""
    sources = [_scale_name(pattern) for pattern in converter.source_patterns]
    targets = [scale_name(pattern) for pattern in converter.target_patterns]
    fit = FitParameter(quantizer)
    return [
        _like(converter, converter.source_patterns, converter.target_patterns, [*converter.operations, fit]),
        _like(converter, sources, targets, [DecodeScales(quantizer), *converter.operations, fit]),
    ]


def dequantizing_converter(converter: WeightConverter, quantizer: HfQuantizer) -> WeightConverter:
    """Returns the conversion of the same tensors as FP8 values and scales."""
    sources = [name for pattern in converter.source_patterns for name in (pattern, _scale_name(pattern))]
    operations = [DequantizeBlocks(quantizer), *converter.operations, FitParameter(quantizer)]
    return _like(converter, sources, converter.target_patterns, operations)


def _like(
    converter: WeightConverter, sources: list[str], targets: list[str], operations: list[ConversionOps]
) -> WeightConverter:
    copy = WeightConverter(list(sources), list(targets), operations)
    copy.scope_prefix, copy.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return copy


def _scale_name(pattern: str) -> str:
    return pattern.removesuffix(WEIGHT) + SCALE


class _AsOnDisk(ConversionOps):
    """An operation that gets its tensors as they are in the files."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        # transformers 5.23 looks for this attribute, and casts the tensors of operations without it.
        self.hf_quantizer = hf_quantizer

    @property
    def blocks(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        config = self.hf_quantizer.quantization_config
        assert isinstance(config, DeepseekFP8Config)
        return config.blocks


class DequantizeBlocks(_AsOnDisk):
    """Dequantizes FP8 values and their scales to the parameter's dtype.

    Tensors that are not FP8 and come without scales (the router, norms, embeddings) are only cast.
    """

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        """Returns the values, or raises ValueError for FP8 values or scales alone, or scales that do not fit."""
        full_layer_name = kwargs["full_layer_name"]
        dtype = _tensor_named(kwargs["model"], full_layer_name).dtype
        out: dict[str, Any] = {}
        for pattern in source_patterns:
            if pattern.endswith(SCALE) or pattern not in input_dict:
                continue
            codes = _as_list(input_dict.pop(pattern))
            scales = _as_list(input_dict.pop(_scale_name(pattern), []))
            pairs: list[tuple[Tensor, Tensor | None]]
            if len(scales) == len(codes):
                pairs = list(zip(codes, scales, strict=True))
            else:  # experts that are FP8 in part: in the same order, but for those without
                left = iter(scales)
                pairs = [(code, next(left, None) if code.dtype == torch.float8_e4m3fn else None) for code in codes]
                if next(left, None) is not None:
                    raise ValueError(
                        f"{full_layer_name}: expected one scale for each FP8 tensor, got {len(codes)} tensors and "
                        f"{len(scales)} scales"
                    )
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
        return dequantize_blocks(codes, scale, self.blocks, dtype)


class DecodeScales(_AsOnDisk):
    """Decodes scales of any storage to float32, which holds every exponent byte exactly."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        """Returns the scales, or raises ValueError for scales that are not finite."""
        try:
            return {name: [decode_scale(scale) for scale in _as_list(value)] for name, value in input_dict.items()}
        except ValueError as error:
            raise ValueError(f"{kwargs['full_layer_name']}: {error}") from None


class FitParameter(_AsOnDisk):
    """Casts to the parameter's dtype and checks the shape, as the last step; transformers 5.17 checks neither here."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        """Returns the tensor, or raises ValueError for another shape, and for FP8 in place of values or vice versa."""
        full_layer_name = kwargs["full_layer_name"]
        (value,) = input_dict.values()
        (tensor,) = _as_list(value)
        expected = _tensor_named(kwargs["model"], full_layer_name)
        if type(expected) in (Tensor, torch.nn.Parameter) and tensor.shape != expected.shape:
            raise ValueError(f"{full_layer_name}: expected shape {list(expected.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != expected.dtype and torch.float8_e4m3fn in (tensor.dtype, expected.dtype):
            raise ValueError(f"{full_layer_name}: expected {expected.dtype}, got {tensor.dtype}")
        return {full_layer_name: tensor.to(expected.dtype)}


def _as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def _tensor_named(model: PreTrainedModel, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)
