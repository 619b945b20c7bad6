"""Layers whose weights stay what a published checkpoint holds: e4m3 codes beside the scales of their blocks.

No product of a layer expands its weight as a whole (absorbed attention, which multiplies with a part of kv_b_proj for
each head, does). There are two, chosen by a layer's `activations`:

- W8A8: the activations become FP8 too, in groups of 1 x 128, and the product is one of FP8 with FP8, as DeepSeek's own
  inference has it (`fp8_gemm`). "auto" takes it where the device multiplies FP8.
- W8A16: the activations stay what they are and the weight is expanded tile by tile inside the product
  (`fp8_weight_gemm`): exact against the dequantized weight, on every device. "auto" takes it everywhere else.

Gradients of the activations, which adapters need, see the dequantized weight in both products.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

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
    """The layers of a model that hold FP8 weights, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Layer)}


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
        ValueError: a weight is not finite, or a parameter belongs to no linear layer and no experts.
    """
    config = getattr(model, "config", None)
    if parameters is None:
        if not isinstance(config, DeepseekConfig):
            raise ValueError(f"expected a DeepseekLM or the names of parameters, got {type(model).__name__}")
        parameters = [slot.parameter for slot in layout(config) if slot.fp8]
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    todo = [path for path in paths if _to_quantize(model, path, block_size)]
    for path in todo:
        layer = model.get_submodule(path)
        kind = FP8Experts if isinstance(layer, Experts) else FP8Linear
        _replace(model, path, kind.quantize(layer, block_size, scale_format))
    if not isinstance(config, DeepseekConfig):
        return model
    said = scale_format_of(config.quantization_config)
    if config.weight_block_size != tuple(block_size) or (todo and said != scale_format):
        formats = {"scale_fmt": scale_format} if scale_format else {}
        _describe_as(model, {**FP8_QUANTIZATION, "weight_block_size": list(block_size), **formats})
    return model


def _to_quantize(model: nn.Module, path: str, block_size: tuple[int, int]) -> bool:
    """Whether a layer is yet to become FP8; raises ValueError where it cannot, before any other one has."""
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


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces FP8 layers by ordinary ones with the values that they mean, in place and one at a time.

    Args:
        dtype: of the weights; default each layer's `compute_dtype`.

    Returns:
        `model`, trainable, with nothing in its config that says FP8 (TRAPS E12).
    """
    for path in list(fp8_layers(model)):
        layer = model.get_submodule(path)
        _replace(model, path, _ordinary(layer, dtype or layer.compute_dtype))
    _describe_as(model, None)
    return model


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _ordinary(layer: FP8Layer, dtype: torch.dtype) -> nn.Module:
    """On the meta device first, so that no weights are drawn only to be replaced."""
    if isinstance(layer, FP8Experts):
        sizes = layer.num_experts, layer.hidden_dim, layer.intermediate_dim
        plain: nn.Module = Experts(*sizes, device="meta", dtype=dtype)
    else:
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
        plain.bias = layer.bias
    for name in layer.held:
        codes, _ = layer.pair(name)
        values = torch.empty(codes.shape, dtype=dtype, device="meta") if codes.is_meta else layer.values(name, dtype)
        setattr(plain, name, nn.Parameter(values))
    return plain.train(layer.training)


def _describe_as(model: nn.Module, quantization: dict | None) -> None:
    for part in model.modules():
        if isinstance(getattr(part, "config", None), DeepseekConfig):
            part.config = part.config.replace(quantization_config=quantization)
