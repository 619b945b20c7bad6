"""`load_state_dict` that understands published names.

Trainer goes on from a checkpoint by reading the files it saved and calling `load_state_dict(..., strict=False)`: with
the published names of the experts in them, the stacked parameters would silently stay as they were.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts
from .conversion import mtp_key_mapping

__all__ = ["accept_published_names"]

_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the trunk's tensors, in a prediction layer


def accept_published_names(model: nn.Module) -> None:
    """Makes `model.load_state_dict` take published names beside its own; a part of the experts is enough (shards).

    Args:
        model: a trunk with `layers`, or a language model with `mtp`; the trunk inside the latter has its own call.
    """
    for name in ("layers", "mtp"):
        for module in getattr(model, name, nn.ModuleList()).modules():
            if isinstance(module, Experts):
                module.register_load_state_dict_pre_hook(_stack_experts)
    if hasattr(model, "mtp"):
        model.register_load_state_dict_pre_hook(_rename_prediction_layers)


def _rename_prediction_layers(model: Any, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Replaces `model.layers.{num_hidden_layers + k}.` by `mtp.{k}.`, and drops copies of the trunk's tensors."""
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
