"""Reading published FP8 checkpoints through transformers: kept byte for byte, or dequantized exactly.

Both by the config's block size. transformers (5.17 to 5.23) infers the block from `rows // scale_rows`, which fails, or
is silently wrong, for any matrix whose last block is partial, and keeps FP8 only on a GPU with kernels from the hub.
Our quantizer goes under a method name of its own, which our configs put in place of "fp8" in memory, so that other
models' FP8 is read as ever.
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

from ..checkpoint.files.reader import TensorInfo, read_header
from ..layout.parameter_map import layout, scale_name
from ..quant.fp8_blocks import decode_scale, dequantize_blocks, scale_format_of
from ..quant.fp8_convert import dequantize, fp8_layers, keep_fp8
from .state_dict_hooks import accept_published_experts

__all__ = ["FP8_METHOD", "PUBLISHED_METHOD", "DeepseekFP8Config", "DeepseekFP8Quantizer"]

FP8_METHOD = "deepseek_fp8"
PUBLISHED_METHOD = "fp8"
_WEIGHT = "weight(?!_scale_inv)"  # without the lookahead, transformers 5.17 also matches the scale's name
_SCALE = scale_name("weight")


@register_quantization_config(FP8_METHOD)
class DeepseekFP8Config(QuantizationConfigMixin):
    """The published `quantization_config`: the block size, and whatever else the file says, kept for saving.

    Args:
        dequantize: load ordinary weights in the model's dtype instead of FP8 layers.
    """

    def __init__(
        self,
        weight_block_size: tuple[int, int] | list[int] | None = None,
        dequantize: bool | None = None,
        **published: Any,
    ) -> None:
        published.pop("quant_method", None)
        self.quant_method = FP8_METHOD
        self.weight_block_size = list(weight_block_size or (128, 128))
        self.dequantize = bool(dequantize)  # also tells transformers that the loaded model is an ordinary one
        self.published = published if dequantize is None else {**published, "dequantize": dequantize}

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
    """Builds FP8 layers for what the files hold in FP8, or puts dequantization in front of the weight conversions."""

    quantization_config: DeepseekFP8Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(f"expected a checkpoint in FP8 for {FP8_METHOD}, got one without a quantization_config")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Looks at the files' headers: they, not the config, say which tensors are FP8.

        Raises:
            ValueError: codes without scales or scales without codes (transformers 5.17 casts codes before anyone could
                miss their scales), or a layer's experts are FP8 only in part.
        """
        tensors: dict[str, TensorInfo] = {}
        for file in checkpoint_files or ():
            if file.endswith(".safetensors"):
                tensors.update(read_header(Path(file)))
        codes = {name for name, info in tensors.items() if info.dtype == "F8_E4M3"}
        without = sorted(name for name in codes if scale_name(name) not in tensors)
        if without:
            raise ValueError(f"expected a scale beside each FP8 tensor, got none for {', '.join(without[:8])}")
        suffix = scale_name("")
        alone = sorted(n for n in tensors if n.endswith(suffix) and n.removesuffix(suffix) not in codes)
        if alone:
            raise ValueError(f"expected FP8 tensors beside the scales, got scales alone: {', '.join(alone[:8])}")
        if not self.quantization_config.dequantize:
            config = self.quantization_config
            stored = None if checkpoint_files is None else codes
            kept = parameters_in_fp8(model, stored, set(tensors))
            keep_fp8(model, config.blocks, kept, scale_format_of(config.published))
            accept_published_experts(model)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """transformers 5.17 calls this without the model."""
        dequantizes, updated = self.quantization_config.dequantize, []
        for entry in weight_conversions:
            if not isinstance(entry, WeightConverter) or not all(p.endswith(_WEIGHT) for p in entry.source_patterns):
                updated.append(entry)
            elif dequantizes:
                updated.append(_with_dequantization(entry, self))
            else:
                updated += _codes_and_scales(entry, self)
        if dequantizes:
            return [
                *updated,
                WeightConverter([_WEIGHT, _SCALE], "weight", [DequantizeBlocks(self), FitParameter(self)]),
            ]
        return [
            *updated,
            WeightConverter(_WEIGHT, "weight", [FitParameter(self)]),
            WeightConverter(_SCALE, _SCALE, [DecodeScales(self), FitParameter(self)]),
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for layer in fp8_layers(model).values():
            for name in layer.held:  # transformers makes every floating-point parameter trainable
                for tensor in layer.pair(name):
                    tensor.requires_grad_(False)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What `model.dequantize()` does; with an adapter attached too, which can then be merged."""
        dequantize(model, dtype)
        accept_published_experts(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def parameters_in_fp8(model: PreTrainedModel, codes: set[str] | None, stored: set[str]) -> set[str]:
    """The model's parameters that the published layout has in FP8 and these files too.

    Args:
        codes: names of the files' FP8 tensors, published or (from `save_original_format=False`) our own; of a trunk
            alone without "model.". None for unknown: then all that the layout says.
        stored: names of all their tensors.

    Raises:
        ValueError: a layer's experts are FP8 only in part.
    """
    own = {name for name, _ in model.named_parameters()}
    kept: set[str] = set()
    partly: dict[str, set[bool]] = {}
    for slot in layout(model.config.to_core()):
        short = slot.parameter.removeprefix("model.")
        parameter = slot.parameter if slot.parameter in own else short
        names = {slot.name, slot.parameter, slot.name.removeprefix("model."), short} & stored
        if not slot.fp8 or parameter not in own or (codes is not None and not names):
            continue
        in_fp8 = codes is None or bool(names & codes)
        if in_fp8:
            kept.add(parameter)
        if slot.index is not None:
            partly.setdefault(parameter.rpartition(".")[0], set()).add(in_fp8)
    mixed = sorted(name for name, kinds in partly.items() if len(kinds) == 2)
    if mixed:
        raise ValueError(
            f"expected a layer's experts to be all FP8 or none, got some of {', '.join(mixed[:8])}; "
            "quantization_config=DeepseekFP8Config(dequantize=True) loads them"
        )
    return kept


def _codes_and_scales(converter: WeightConverter, quantizer: DeepseekFP8Quantizer) -> list[WeightConverter]:
    """The same conversion twice: of the weights, FP8 or not, and of the scales into the parameter beside theirs."""
    sources = [_scale_name(pattern) for pattern in converter.source_patterns]
    targets = [scale_name(pattern) for pattern in converter.target_patterns]
    fit = FitParameter(quantizer)
    return [
        _like(converter, converter.source_patterns, converter.target_patterns, [*converter.operations, fit]),
        _like(converter, sources, targets, [DecodeScales(quantizer), *converter.operations, fit]),
    ]


def _with_dequantization(converter: WeightConverter, quantizer: DeepseekFP8Quantizer) -> WeightConverter:
    """The same conversion of the same tensors, which now come as codes and scales."""
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
    return pattern.removesuffix(_WEIGHT) + _SCALE


class _AsOnDisk(ConversionOps):
    """An operation that its tensors must reach as they are in the files."""

    def __init__(self, hf_quantizer: DeepseekFP8Quantizer) -> None:
        # By this name transformers 5.23 knows.
        self.hf_quantizer = hf_quantizer


class DequantizeBlocks(_AsOnDisk):
    """Codes and scales -> values in the parameter's dtype.

    Tensors that are not FP8 and come without scales (the router, norms, embeddings) are only cast.
    """

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
        return dequantize_blocks(codes, scale, self.hf_quantizer.quantization_config.blocks, dtype)


class DecodeScales(_AsOnDisk):
    """Scales of any storage -> float32, which stands for every exponent byte exactly."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Any]:
        """Raises ValueError for scales that are not finite."""
        try:
            return {name: [decode_scale(scale) for scale in _as_list(value)] for name, value in input_dict.items()}
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from None


class FitParameter(_AsOnDisk):
    """The last step: one tensor of the parameter's shape and dtype. transformers 5.17 checks neither in such files."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Raises ValueError for another shape, and for codes where values belong or the other way round."""
        (value,) = input_dict.values()
        (tensor,) = _as_list(value)
        expected = _tensor_named(model, full_layer_name)
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
