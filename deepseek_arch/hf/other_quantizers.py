"""Quantizers of transformers other than ours: bitsandbytes, torchao, quanto and the like.

Some convert only what is exactly `nn.Linear`, and all report a quantized model whatever they converted. Under another
quantizer our linear layers are built as that class, and a load that converted nothing fails.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..layers.linear import Linear
from ..moe.moe import Experts
from .fp8_config import FP8_METHOD

__all__ = ["check_conversion", "has_other_quantizer", "make_linears_plain", "restore_linears"]


def has_other_quantizer(config: Any) -> bool:
    """Returns True if `config.quantization_config` is for a quantizer other than ours."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    else:
        method = getattr(quantization, "quant_method", None)
    return method != FP8_METHOD


def make_linears_plain(model: nn.Module) -> None:
    """Turns our linear layers into `nn.Linear`, which they are but for the kernel, in place."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def restore_linears(model: nn.Module) -> None:
    """Turns the linear layers that the quantizer left into ours again."""
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.is_floating_point():
            module.__class__ = Linear


def check_conversion(model: nn.Module, method: Any) -> None:
    """Checks that a quantizer has converted linear layers, and says what it has left.

    Args:
        model: after the load, and after `restore_linears`.
        method: the quantizer's name.

    Raises:
        ValueError: every linear layer is an ordinary one.
    """
    method = getattr(method, "value", method)
    if not any(_is_converted(module) for module in model.modules()):
        raise ValueError(f"expected {method} to convert linear layers, got a model without a converted one")
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    left = sum(p.numel() for module in experts for p in module.parameters() if type(p) is nn.Parameter)
    if left:
        warnings.warn(
            f"{method} converts linear layers; the stacked experts, {left} parameters, stay in {model.dtype}",
            stacklevel=2,
        )


def _is_converted(module: nn.Module) -> bool:
    if type(module) in (Linear, nn.Linear):
        return type(module.weight) is not nn.Parameter or not module.weight.is_floating_point()
    return isinstance(module, nn.Linear) or type(module).__name__.endswith("Linear") or hasattr(module, "qweight")
