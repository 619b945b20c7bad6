"""Tensors of a model that is to be saved, compared with its config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import TensorSlot, layout, scale_name
from ..moe.adapter_state import biases_in_adapters
from ..quant.fp8_convert import fp8_layers
from .files.shards import GENERATION_CONFIG_NAME

__all__ = ["CheckedModel", "StoredKinds", "check_model"]


@dataclass(frozen=True)
class StoredKinds:
    """Kinds of tensors in a model, or in the stages of one that a rank has.

    Attributes:
        dtypes: of all but FP8 codes, their scales and the biases of routers.
        embedding: of the embedding; None where other ranks have it.
        block_sizes: of FP8 layers.
    """

    dtypes: frozenset[torch.dtype]
    embedding: torch.dtype | None
    block_sizes: frozenset[tuple[int, int]]

    @classmethod
    def of_all(cls, parts: Sequence[StoredKinds]) -> StoredKinds:
        """Returns the kinds of a whole model."""
        embedding = next((part.embedding for part in parts if part.embedding is not None), None)
        dtypes = frozenset[torch.dtype]().union(*(part.dtypes for part in parts))
        return cls(dtypes, embedding, frozenset[tuple[int, int]]().union(*(part.block_sizes for part in parts)))


@dataclass(frozen=True)
class CheckedModel:
    """Tensors of a model, or of the stages of one that this rank has, which are those that its config describes.

    Attributes:
        state: the tensors; slots: the published ones that they are to be written as.
        fp8_parameters: entries of `state` that are FP8 codes.
        more: content of further JSON files.
    """

    state: dict[str, Tensor]
    config: DeepseekConfig
    slots: list[TensorSlot]
    fp8_parameters: frozenset[str]
    kinds: StoredKinds
    more: dict[str, dict[str, Any]]


def check_model(model: nn.Module, cut: bool = False) -> CheckedModel:
    """Compares a model's tensors with its config.

    Args:
        cut: its parameters may be spread over the ranks that run; of a pipeline only this rank's stages are here.

    Raises:
        ValueError: the tensors are not what the config says.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, DeepseekConfig):
        raise ValueError(f"expected a DeepseekLM, got {type(model).__name__}")
    meshes: Any = getattr(model, "meshes", None)
    staged = meshes is not None and meshes.stages is not None
    if staged and not cut:
        raise ValueError("expected a running process group for the stages of a pipeline, got none")
    with biases_in_adapters(model, False):  # adapters that were merged since had their own names for them
        state = model.state_dict()
    layers = fp8_layers(model)
    fp8_parameters = frozenset(f"{path}.{name}" for path, layer in layers.items() for name in layer.quantized_params)
    every = list(layout(config))
    slots = [slot for slot in every if meshes.holds(slot.name)] if staged else every
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
        elif tensor.dtype == torch.float8_e4m3fn and slot.parameter not in fp8_parameters:
            wrong.append(f"{slot.parameter}: expected FP8 codes in an FP8Linear or FP8Experts, got them without scales")
    known = {slot.parameter for slot in every} | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    known |= {scale_name(name) for name in fp8_parameters}
    unknown = sorted(set(state) - known)
    wrong += [f"{name}: not a parameter of this model (merge adapters first)" for name in unknown]
    if wrong:
        raise ValueError("expected the parameters that the model's config describes: " + "; ".join(wrong[:5]))
    block_sizes = frozenset(layer.block_size for layer in layers.values() if layer.quantized_params)
    kinds = _kinds(state, fp8_parameters, block_sizes)
    defaults = _generation_config(model)
    more = {GENERATION_CONFIG_NAME: defaults} if defaults else {}
    return CheckedModel(state, config, slots, fp8_parameters, kinds, more)


def _kinds(
    state: dict[str, Tensor], fp8_parameters: frozenset[str], block_sizes: frozenset[tuple[int, int]]
) -> StoredKinds:
    codes_and_scales = fp8_parameters | {scale_name(name) for name in fp8_parameters}
    ordinary = {name: tensor for name, tensor in state.items() if name not in codes_and_scales}
    dtypes = {tensor.dtype for name, tensor in ordinary.items() if not name.endswith(".e_score_correction_bias")}
    embedding = state.get("model.embed_tokens.weight")
    return StoredKinds(frozenset(dtypes), None if embedding is None else embedding.dtype, block_sizes)


def _shape(slot: TensorSlot, tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of a published tensor in its parameter; the parameter's own where it has no room for it."""
    if slot.index is None or tensor.ndim != 3 or slot.index[0] >= tensor.shape[0] or slot.index[2] > tensor.shape[1]:
        return tuple(tensor.shape)
    return slot.index[2] - slot.index[1], tensor.shape[2]


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
