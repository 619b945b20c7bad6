"""`load_state_dict` that understands published names.

Trainer goes on from a checkpoint by reading the files it saved and calling `load_state_dict(..., strict=False)`: with the
published names of the experts in them, the stacked parameters would silently stay as they were.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DeepseekConfig
from ..moe import Experts
from .conversion import mtp_key_mapping

__all__ = ["accept_published_names"]

_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the trunk's tensors, in a prediction layer


def accept_published_names(model: nn.Module, core: DeepseekConfig) -> None:
    """Makes `model.load_state_dict` take published names beside its own; a part of the experts is enough (shards)."""
    for module in model.modules():
        if isinstance(module, Experts) and not hasattr(module, "_takes_published_names"):
            module.register_load_state_dict_pre_hook(_stack_experts)
            module._takes_published_names = True
    renames = [(re.compile(published), own) for published, own in mtp_key_mapping(core).items()]

    def rename_prediction_layers(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for key in list(state_dict):
            for published, own in renames:
                name = key.removeprefix(prefix)
                if key.startswith(prefix) and published.search(name):
                    tensor, name = state_dict.pop(key), published.sub(own, name)
                    if not name.endswith(_COPIES):
                        state_dict[prefix + name] = tensor

    if renames and hasattr(model, "mtp"):
        model.register_load_state_dict_pre_hook(rename_prediction_layers)


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
    """Replaces `{expert}.{gate,up,down}_proj.weight` by the stacked parameters."""
    for name, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        parameter = getattr(module, name)
        rows = parameter.shape[1] // len(projections)
        places = {
            f"{prefix}{expert}.{projection}.weight": (expert, slice(part * rows, (part + 1) * rows))
            for expert in range(parameter.shape[0])
            for part, projection in enumerate(projections)
        }
        found = [key for key in places if key in state_dict]
        if not found:
            continue
        first = state_dict[found[0]]
        # With a part of the experts the others keep their weights.
        whole = len(found) == len(places)
        stacked = torch.empty_like(parameter, device=first.device) if whole else parameter.detach().clone()
        for key in found:
            tensor, expected = state_dict.pop(key), (rows, parameter.shape[2])
            if tuple(tensor.shape) == expected:
                stacked[places[key]] = tensor.to(stacked)
            else:
                error_msgs.append(f"size mismatch for {key}: expected {list(expected)}, got {list(tensor.shape)}")
        state_dict[prefix + name] = stacked.detach()
