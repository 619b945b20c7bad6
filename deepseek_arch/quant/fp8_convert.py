"""Conversion of a model's layers to FP8 weights, e4m3 values beside the scales of their blocks, and back.

No GEMM of a layer expands its weight as a whole (absorbed attention, which multiplies by a part of kv_b_proj for each
head, does). There are two, chosen by a layer's `activations`:

- W8A8: the activations become FP8 too, in groups of 1 x 128, and FP8 is multiplied by FP8, as in DeepSeek's own
  inference (`fp8_gemm`). "auto" takes it where the device multiplies FP8.
- W8A16: the activations stay as they are and the weight is expanded tile by tile inside the GEMM
  (`fp8_weight_gemm`): exact against the dequantized weight, on every device. "auto" takes it everywhere else.

Gradients of the activations, which adapters need, use the dequantized weight in both.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ..config.argument_types import check_types, shown
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import Linear
from ..layout.parameter_map import layout
from ..moe.moe import Experts
from .fp8_base import GROUP, FP8Layer
from .fp8_blocks import FP8_QUANTIZATION, scale_format_of
from .fp8_experts import FP8Experts
from .fp8_linear import FP8Linear

__all__ = ["dequantize", "fp8_layers", "keep_fp8"]


def fp8_layers(model: nn.Module) -> dict[str, FP8Layer]:
    """Returns the layers of a model that keep FP8 weights, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Layer)}


@check_types
def keep_fp8(
    model: nn.Module,
    block_size: tuple[int, int] = GROUP,
    parameters: Collection[str] | None = None,
    scale_format: str | None = None,
) -> nn.Module:
    """Replaces the layers that the published FP8 checkpoints store in FP8, in place and one at a time.

    These are attention's projections, MLPs and experts, in prediction layers too; never the embedding, head, router,
    norms and eh_proj (TRAPS E7).

    Args:
        model: with memory, where weights are rounded to FP8, or on the meta device, where only the layers change.
        parameters: names of weights to keep in FP8 instead of all of those; both of a layer's experts or neither.
        scale_format: None or "ue8m0", of the scales, those of quantized activations included.

    Returns:
        `model`. The config of a `DeepseekLM` says that it is FP8.

    Raises:
        ValueError: a weight is not finite, a parameter belongs to no linear layer and no experts, or `parallelize` has
            cut the model.
    """
    _check_whole(model)
    config = getattr(model, "config", None)
    if parameters is None:
        if not isinstance(config, DeepseekConfig):
            raise ValueError(f"expected a DeepseekLM or the names of parameters, got {type(model).__name__}")
        parameters = [slot.parameter for slot in layout(config) if slot.fp8]
    if not all(isinstance(name, str) for name in parameters):
        raise ValueError(f"expected parameters to be names, got {shown(parameters)}")
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    remaining = [path for path in paths if _needs_quantizing(model, path, block_size)]
    for path in remaining:
        layer = model.get_submodule(path)
        if isinstance(layer, Experts):
            _replace(model, path, FP8Experts.quantize(layer, block_size, scale_format))
        else:
            assert isinstance(layer, nn.Linear)
            _replace(model, path, FP8Linear.quantize(layer, block_size, scale_format))
    if not isinstance(config, DeepseekConfig):
        return model
    configured = scale_format_of(config.quantization_config)
    if config.weight_block_size != tuple(block_size) or (remaining and configured != scale_format):
        formats = {"scale_fmt": scale_format} if scale_format else {}
        _describe_as(model, {**FP8_QUANTIZATION, "weight_block_size": list(block_size), **formats})
    return model


def _needs_quantizing(model: nn.Module, path: str, block_size: tuple[int, int]) -> bool:
    """Returns True if a layer is not FP8 yet; raises ValueError where it cannot be, before another has changed."""
    layer = model.get_submodule(path)
    if isinstance(layer, FP8Layer):
        if tuple(layer.block_size) != tuple(block_size):
            raise ValueError(
                f"expected {path} to have FP8 blocks of {list(block_size)}, got {list(layer.block_size)} already"
            )
        return False
    if not isinstance(layer, Experts | nn.Linear):
        raise ValueError(f"expected {path} to be a linear layer or experts, got {type(layer).__name__}")
    for name, parameter in layer.named_parameters(recurse=False):
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ValueError(f"expected finite weights in {path}.{name}, got NaN or infinity")
    return True


@check_types
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces FP8 layers by ordinary ones with the same values, in place and one at a time.

    Args:
        dtype: of the weights; default each layer's `compute_dtype`.

    Returns:
        `model`, trainable, with nothing in its config that says FP8 (TRAPS E12).

    Raises:
        ValueError: `parallelize` has cut the model.
    """
    _check_whole(model)
    for path, layer in fp8_layers(model).items():
        _replace(model, path, _ordinary(layer, dtype or layer.compute_dtype))
    _describe_as(model, None)
    return model


def _check_whole(model: nn.Module) -> None:
    """Raises ValueError for a model that is cut: its layers would lose the way in which they compute on parts."""
    if getattr(model, "meshes", None) is not None:
        raise ValueError("expected a model that is not cut over ranks, got one that parallelize has cut")


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _ordinary(layer: FP8Layer, dtype: torch.dtype) -> nn.Module:
    """Returns the layer without FP8, built on the meta device so that no weights are drawn only to be replaced."""
    ordinary: Experts | Linear
    if isinstance(layer, FP8Experts):
        sizes = layer.num_experts, layer.hidden_dim, layer.intermediate_dim
        ordinary = Experts(*sizes, layer.activation, device="meta", dtype=dtype)
    else:
        assert isinstance(layer, FP8Linear)
        ordinary = Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
        ordinary.bias = layer.bias
    for name in layer.quantized_params:
        codes, _ = layer.pair(name)
        meta = codes.is_meta
        values = torch.empty(codes.shape, dtype=dtype, device="meta") if meta else layer.dequantized(name, dtype)
        setattr(ordinary, name, nn.Parameter(values))
    return ordinary.train(layer.training)


def _describe_as(model: nn.Module, quantization: dict | None) -> None:
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, DeepseekConfig):
            setattr(part, "config", config.replace(quantization_config=quantization))  # noqa: B010  (a Tensor, to mypy)
