"""Targets of adapters that name both single experts, as transformers 4 had them, and linear layers that still exist.

PEFT moves `gate_proj`, `up_proj` and `down_proj` to the stacked experts' parameters altogether: dense layers and shared
experts are no longer adapted then, and their part of a saved adapter is dropped. For our models these names keep the
linear layers that they match, and a name that matches no expert (`shared_experts.down_proj`) does not reach them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..moe.moe import Experts
from .configuration import ArchConfig

__all__ = ["keep_linear_targets"]

_MODULE = "peft.utils.transformers_weight_conversion"
_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def keep_linear_targets() -> None:
    """Makes PEFT keep linear layers among the targets of adapters for our models; nothing before PEFT is imported."""
    module = sys.modules.get(_MODULE)
    convert = getattr(module, "_convert_peft_config_moe", None)
    if module is not None and convert is not None and not hasattr(convert, "keeps_linear_targets"):
        module._convert_peft_config_moe = _keeping(convert)  # type: ignore[attr-defined]


def _keeping(convert: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def convert_config(peft_config: Any, model: Any) -> None:
        targets = peft_config.target_modules
        if not isinstance(getattr(model, "config", None), ArchConfig) or not targets:
            convert(peft_config, model)
            return
        if isinstance(targets, str):
            linear = _matched(peft_config, model)
            convert(peft_config, model)
            if not isinstance(peft_config.target_modules, str):
                peft_config.target_modules = linear  # exactly those, not all with the same last name
            return
        linear = {target for target in targets if _matches(target, _linear_layers(model))}
        only = {target for target in linear if not _matches(target, _single_experts(model))}
        peft_config.target_modules = set(targets) - only
        convert(peft_config, model)
        peft_config.target_modules = set(peft_config.target_modules) | linear

    convert_config.keeps_linear_targets = True  # type: ignore[attr-defined]
    return convert_config


def _matched(peft_config: Any, model: nn.Module) -> set[str]:
    """Returns the modules that a pattern, or "all-linear", names."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    if peft_config.target_modules.lower() == "all-linear":
        config: Any = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        return set(config.target_modules)
    names = [name for name, _ in model.named_modules() if name]
    return {name for name in names if check_target_module_exists(peft_config, name)}


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _single_experts(model: nn.Module) -> list[str]:
    """Returns the names of the experts' linear layers in transformers 4; of one layer, and one expert."""
    stacked = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    return [f"{name}.0.{projection}" for name in stacked for projection in _EXPERTS]


def _matches(target: str, names: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
