"""Routing of what was generated, recorded as it was: to be replayed where a rollout is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.causal_lm import DeepseekLM
from ..moe.moe import MoE
from ..moe.routing_record import RoutingRecord

__all__ = ["check_recording", "rollout_record"]


def check_recording(model: DeepseekLM, new: int, drafts: int, compiled: bool) -> None:
    """Raises ValueError where a rollout's routing cannot be recorded."""
    if drafts:
        raise ValueError(f"expected mtp_depth 0 with record_routing, since rejected drafts route too, got {drafts}")
    if compiled:
        raise ValueError("expected compiled=False with record_routing, got True")
    if not any(isinstance(layer.mlp, MoE) for layer in model.model.layers):
        raise ValueError("expected a model with experts for record_routing, got one without any")
    if not new:
        raise ValueError("expected max_new_tokens >= 1 with record_routing, got 0")


def rollout_record(
    records: Sequence[RoutingRecord], attention_mask: Tensor | None, prompt: int, lengths: Tensor
) -> RoutingRecord:
    """The records of all passes of a rollout as one, [B, T].

    Args:
        records: of consecutive tokens, prompts first.
        attention_mask: [B, prompt], or None.
        prompt: tokens of the prompts, padding included.
        lengths: int64 [B], the tokens of each row, prompt and its end token included; what stands behind is padding.
    """
    layers = records[0].ids
    ids = {layer: torch.cat([record.ids[layer] for record in records], 1) for layer in layers}
    margins = {layer: torch.cat([record.margins[layer] for record in records], 1) for layer in layers}
    tokens = next(iter(ids.values())).shape[1]
    valid = torch.arange(tokens, device=lengths.device) < lengths[:, None]
    if attention_mask is not None:
        valid[:, :prompt] = attention_mask != 0
    return RoutingRecord(ids, margins, None if bool(valid.all()) else valid)
