"""Quantizer of transformers for published FP8 checkpoints: kept byte for byte, or dequantized exactly.

Both by the config's block size. transformers (5.17 to 5.23) infers the block from `rows // scale_rows`, which fails, or
is silently wrong, for any matrix whose last block is partial, and keeps FP8 only on a GPU with kernels from the hub.
Our quantizer has a method name of its own (`fp8_config`), so that other models' FP8 is read as ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.files.reader import TensorInfo, read_header
from ..layout.parameter_map import layout, scale_name
from ..quant.fp8_blocks import scale_format_of
from ..quant.fp8_convert import dequantize, fp8_layers, keep_fp8
from .fp8_config import FP8_METHOD, DeepseekFP8Config
from .fp8_conversions import (
    SCALE,
    WEIGHT,
    DecodeScales,
    DequantizeBlocks,
    FitParameter,
    dequantizing_converter,
    fp8_converters,
)
from .fp8_cuts import StoredInFP8
from .state_dict_hooks import accept_published_experts

__all__ = ["DeepseekFP8Quantizer"]


@register_quantizer(FP8_METHOD)
class DeepseekFP8Quantizer(HfQuantizer):
    """Builds FP8 layers for tensors that are FP8 in the files, or puts dequantization before the weight conversions."""

    quantization_config: DeepseekFP8Config
    # With it, transformers' parallel plans cut the scales of stacked experts as they cut the codes.
    serialized_names: dict[str, list[str]] = {"weight": ["weight", scale_name("weight")]}  # noqa: RUF012

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(f"expected a checkpoint in FP8 for {FP8_METHOD}, got one without a quantization_config")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Reads the files' headers: they, not the config, say which tensors are FP8.

        Raises:
            ValueError: FP8 tensors or scales alone (transformers 5.17 casts FP8 before the missing scales could be
                noticed), or a layer's experts are FP8 only in part.
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
        config = self.quantization_config
        stored = None if checkpoint_files is None else codes
        in_fp8 = parameters_in_fp8(model, stored, set(tensors), in_part=config.dequantize)
        stored_in_fp8: Any = StoredInFP8(frozenset(in_fp8), config.blocks, kept=not config.dequantize)
        model.stored_in_fp8 = stored_in_fp8
        if not config.dequantize:
            keep_fp8(model, config.blocks, in_fp8, scale_format_of(config.published))
            accept_published_experts(model)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Returns the conversions with those of scales added; transformers 5.17 calls this without the model."""
        dequantizes, updated = self.quantization_config.dequantize, []
        for entry in weight_conversions:
            if not isinstance(entry, WeightConverter) or not all(p.endswith(WEIGHT) for p in entry.source_patterns):
                updated.append(entry)
            elif dequantizes:
                updated.append(dequantizing_converter(entry, self))
            else:
                updated += fp8_converters(entry, self)
        if dequantizes:
            return [
                *updated,
                WeightConverter([WEIGHT, SCALE], "weight", [DequantizeBlocks(self), FitParameter(self)]),
            ]
        return [
            *updated,
            WeightConverter(WEIGHT, "weight", [FitParameter(self)]),
            WeightConverter(SCALE, SCALE, [DecodeScales(self), FitParameter(self)]),
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for layer in fp8_layers(model).values():
            for name in layer.quantized_params:  # transformers makes every floating-point parameter trainable
                for tensor in layer.pair(name):
                    tensor.requires_grad_(False)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dequantizes for `model.dequantize()`; with an adapter attached too, which can then be merged."""
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


def parameters_in_fp8(
    model: PreTrainedModel, codes: set[str] | None, stored: set[str], in_part: bool = False
) -> set[str]:
    """Returns the model's parameters that are FP8 both in the published layout and in these files.

    Args:
        codes: names of the files' FP8 tensors, published or (from `save_original_format=False`) our own; of a
            main model alone without "model.". None where the files are unknown: then as the layout says.
        stored: names of all their tensors.
        in_part: takes stacked experts of which only some are FP8, too.

    Raises:
        ValueError: without `in_part`, a layer's experts are FP8 only in part.
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
    if mixed and not in_part:
        raise ValueError(
            f"expected a layer's experts to be all FP8 or none, got some of {', '.join(mixed[:8])}; "
            "quantization_config=DeepseekFP8Config(dequantize=True) loads them"
        )
    return kept
