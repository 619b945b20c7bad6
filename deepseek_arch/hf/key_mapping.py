"""Published tensor names <-> parameters, in transformers' terms.

Stacking the experts is registered for our class names when this module is imported (transformers knows
classes from outside by their names only, and would leave the experts random). The number of an MTP module depends on
the config, so its names are passed to each load (`mtp_key_mapping`), and each model carries the conversions that saving
undoes (`saving_conversions`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
)

from ..config.deepseek_config import DeepseekConfig

__all__ = ["loading_conversions", "mtp_key_mapping", "register_conversions", "saving_conversions"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class KeepOne(ConversionOps):
    """Several stored copies of one tensor become that tensor; saving writes the copies again."""

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        """Returns the tensor, or raises ValueError for copies that differ."""
        tensors = [t for pattern in source_patterns for t in _as_list(input_dict.get(pattern, []))]
        first, *others = tensors
        for other in others:
            if not torch.equal(other.to(first.dtype), first):
                raise ValueError(
                    f"expected {target_patterns[0]} and its copies in the MTP modules to be equal, got others"
                )
        return {target_patterns[0]: first}

    @property
    def reverse_op(self) -> ConversionOps:
        return WriteCopies()


class WriteCopies(ConversionOps):
    """One tensor becomes as many equal ones as there are names; clones, since safetensors refuses shared memory."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        (value,) = input_dict.values()
        (tensor,) = _as_list(value)
        return {name: tensor.clone() if i else tensor for i, name in enumerate(target_patterns)}

    @property
    def reverse_op(self) -> ConversionOps:
        return KeepOne()


class StackScales(MergeModulelist):
    """Stacks the scale grids of the experts; the way back leaves grids of one row or column as they are.

    transformers 5.17 removes every dimension of size 1 there, not only the experts'.
    """

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackScales(self.dim)


class UnstackScales(SplitModulelist):
    """The reverse of `StackScales`."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Tensor], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for pattern, value in input_dict.items():
            (stacked,) = _as_list(value)
            names = self.get_target_patterns(input_dict, pattern, target_patterns, stacked.size(self.dim))
            out |= dict(zip(names, stacked.unbind(self.dim), strict=True))
        return out

    @property
    def reverse_op(self) -> ConversionOps:
        return StackScales(self.dim)


def _expert_conversions() -> list[WeightConverter | WeightRenaming]:
    # The lookahead keeps `weight` from matching `weight_scale_inv` in transformers 5.17.
    gate, up, down = (f"mlp.experts.*.{name}_proj.weight(?!_scale_inv)" for name in ("gate", "up", "down"))
    return [
        WeightConverter([gate, up], "mlp.experts.gate_up_proj", [MergeModulelist(0), Concatenate(1)]),
        WeightConverter(down, "mlp.experts.down_proj", [MergeModulelist(0)]),
    ]


def _scale_conversions() -> list[WeightConverter | WeightRenaming]:
    gate, up, down = (f"mlp.experts.*.{name}_proj.weight_scale_inv" for name in ("gate", "up", "down"))
    return [
        WeightConverter([gate, up], "mlp.experts.gate_up_proj_scale_inv", [StackScales(0), Concatenate(1)]),
        WeightConverter(down, "mlp.experts.down_proj_scale_inv", [StackScales(0)]),
    ]


def loading_conversions(causal_lm: bool) -> list[WeightConverter | WeightRenaming]:
    """Returns the conversions to register for a class.

    Args:
        causal_lm: for a class with MTP modules, which bring copies of the embedding and the head.
    """
    # The name of a router's bias in the files of adapters (`moe.adapter_state`).
    biases = WeightRenaming(r"e_score_correction\.bias", "e_score_correction_bias")
    if not causal_lm:
        return [biases, *_expert_conversions()]
    return [
        biases,
        WeightConverter([rf"^{_EMBEDDING}", r"^mtp\.\d+\.embed_tokens\.weight"], _EMBEDDING, [KeepOne()]),
        WeightConverter([rf"^{_HEAD}", r"^mtp\.\d+\.shared_head\.head\.weight"], _HEAD, [KeepOne()]),
        *_expert_conversions(),
    ]


def mtp_key_mapping(core: DeepseekConfig) -> dict[str, str]:
    """Returns our prefix by published prefix (a regular expression), for each MTP module of the config."""
    first = core.num_hidden_layers
    return {rf"^model\.layers\.{first + k}\.": f"mtp.{k}." for k in range(core.num_nextn_predict_layers)}


def saving_conversions(core: DeepseekConfig | None, fp8: bool = False) -> list[WeightConverter | WeightRenaming]:
    """Returns the conversions whose reverse turns a state dict into the published tensors.

    Args:
        core: the config of a causal language model, or None for a model without MTP modules.
        fp8: for a model with experts in FP8.
    """
    # Last: the reverse goes backwards, and in transformers 5.17 `gate_up_proj` also matches `gate_up_proj_scale_inv`.
    experts = [*_expert_conversions(), *(_scale_conversions() if fp8 else ())]
    if core is None or not core.num_nextn_predict_layers:
        return experts
    numbers = range(core.num_hidden_layers, core.num_hidden_layers + core.num_nextn_predict_layers)
    layers = [f"model.layers.{number}." for number in numbers]
    embeddings = [f"{layer}embed_tokens.weight" for layer in layers]
    heads = [f"{layer}shared_head.head.weight" for layer in layers]
    # A tied head is not in the state dict: its copies are the embedding's.
    tied = core.tie_word_embeddings
    copies: list[WeightConverter | WeightRenaming] = [
        WeightConverter([_EMBEDDING, *embeddings, *(heads if tied else ())], _EMBEDDING, [KeepOne()])
    ]
    if not tied:
        copies.append(WeightConverter([_HEAD, *heads], _HEAD, [KeepOne()]))
    renamings: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(published, rf"^mtp\.{k}\.") for k, published in enumerate(mtp_key_mapping(core))
    ]
    return [*renamings, *copies, *experts]


def register_conversions(class_name: str, causal_lm: bool = False) -> None:
    """Registers with transformers the conversions for our class of that name."""
    register_checkpoint_conversion_mapping(class_name, loading_conversions(causal_lm), overwrite=True)


def _as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    return value if isinstance(value, list) else [value]
