"""`load_state_dict` that understands published names.

Trainer goes on from a checkpoint by reading the files it saved and calling `load_state_dict(..., strict=False)`: with
the published names of the experts in them, the stacked parameters would silently stay as they were.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..layout.parameter_map import scale_name
from ..moe.moe import Experts
from ..quant.fp8_base import FP8Layer
from .key_mapping import mtp_key_mapping

__all__ = ["accept_published_experts", "accept_published_names", "report_lost_adapters"]

_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the main model's tensors, in an MTP module


def accept_published_names(model: nn.Module) -> None:
    """Makes `model.load_state_dict` take published names beside its own; a part of the experts is enough (shards).

    Args:
        model: a main model with `layers`, or a language model with `mtp`, whose main model has its own call.
    """
    for name in ("layers", "mtp"):
        accept_published_experts(getattr(model, name, nn.ModuleList()))
    if hasattr(model, "mtp"):
        model.register_load_state_dict_pre_hook(_rename_mtp_modules)


def accept_published_experts(model: nn.Module) -> None:
    """Makes the experts within `model` take published names; for experts that have replaced others, too."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.register_load_state_dict_pre_hook(_stack_experts)


def _rename_mtp_modules(model: Any, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Replaces `model.layers.{num_hidden_layers + k}.` by `mtp.{k}.`, and drops copies of the main model's tensors."""
    for published, own in mtp_key_mapping(model.config.to_core()).items():
        pattern = re.compile(published)
        for key in [key for key in state_dict if key.startswith(prefix) and pattern.search(key[len(prefix) :])]:
            tensor, name = state_dict.pop(key), pattern.sub(own, key[len(prefix) :])
            if not name.endswith(_COPIES):
                state_dict[prefix + name] = tensor


def _stack_experts(
    module: Experts,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Replaces `{expert}.{gate,up,down}_proj.weight`, and scales, by the stacked parameters."""
    for name, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        _stack(module, name, [f"{p}.weight" for p in projections], state_dict, prefix, error_msgs)
        if isinstance(module, FP8Layer):
            scales = [scale_name(f"{p}.weight") for p in projections]
            _stack(module, scale_name(name), scales, state_dict, prefix, error_msgs)


def _stack(
    module: Experts,
    name: str,
    published: list[str],
    state_dict: dict[str, Tensor],
    prefix: str,
    error_msgs: list[str],
) -> None:
    """Replaces the `published` tensors of each expert by the stacked parameter `name`."""
    parameter = getattr(module, name)
    rows = parameter.shape[1] // len(published)
    places = {
        f"{prefix}{expert}.{tail}": (expert, slice(part * rows, (part + 1) * rows))
        for expert in range(parameter.shape[0])
        for part, tail in enumerate(published)
    }
    found = [key for key in places if key in state_dict]
    if not found:
        return
    first = state_dict[found[0]]
    # With a part of the experts given, the others keep their weights.
    whole = len(found) == len(places)
    stacked = torch.empty_like(parameter, device=first.device) if whole else parameter.detach().clone()
    known = len(error_msgs)
    for key in found:
        tensor, expected = state_dict.pop(key), (rows, parameter.shape[2])
        if (tensor.dtype == torch.float8_e4m3fn) != (parameter.dtype == torch.float8_e4m3fn):
            # A cast would take values for FP8, or FP8 for values (TRAPS E11).
            error_msgs.append(f"dtype mismatch for {key}: expected {parameter.dtype}, got {tensor.dtype}")
        elif tuple(tensor.shape) != expected:
            error_msgs.append(f"size mismatch for {key}: expected {list(expected)}, got {list(tensor.shape)}")
        else:
            stacked[places[key]] = tensor.to(stacked)
    if len(error_msgs) == known:
        state_dict[prefix + name] = stacked.detach()


def report_lost_adapters(module: nn.Module, incompatible_keys: Any) -> None:
    """Warns of adapter tensors that no module takes; PEFT loads with `strict=False` and says nothing."""
    lost = sorted(key for key in incompatible_keys.unexpected_keys if ".lora_" in key)
    if lost:
        warnings.warn(
            f"{len(lost)} adapter tensors belong to no module of this model and are left out: "
            + ", ".join(lost[:8])
            + (" and others" if len(lost) > 8 else ""),
            stacklevel=2,
        )
