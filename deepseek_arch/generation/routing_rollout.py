"""Routing decisions of a rollout, recorded while it was generated: training on it replays them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.causal_lm import DeepseekLM
from ..moe.routing_record import RoutingRecord

__all__ = ["RolloutRouting", "check_recording", "valid_tokens"]


def check_recording(model: DeepseekLM, new_tokens: int, compiled: bool) -> None:
    """Raises ValueError where a rollout's routing cannot be recorded."""
    if compiled:
        raise ValueError("expected compiled=False with record_routing, got True")
    if not any(model.config.is_moe_layer(i) for i in range(model.config.num_hidden_layers)):
        raise ValueError("expected a model with experts for record_routing, got one without any")
    if not new_tokens:
        raise ValueError("expected max_new_tokens >= 1 with record_routing, got 0")


class RolloutRouting:
    """Collects the routing decisions of the main model pass by pass, and puts them in the order of the tokens."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor | None, RoutingRecord]] = []

    def add(self, record: RoutingRecord, rows: Tensor, columns: Tensor, final: Tensor | None = None) -> None:
        """Adds one pass over R rows of T tokens.

        Args:
            record: of [R, T] tokens.
            rows: int64 [R], rows of the result.
            columns: int64 [T] or [R, T], columns of the result.
            final: bool [R, T], False for tokens that are not in the result, as rejected drafts; None for all True.
        """
        rows = rows[:, None].expand(record.shape)
        self._parts.append((rows, columns.expand(record.shape), final, record))

    def record(self, valid: Tensor) -> RoutingRecord:
        """Returns the decisions for all tokens of the result.

        Args:
            valid: bool [B, T], False for padding and behind the end of a row.
        """
        places, chosen = [], []
        for rows, columns, final, _ in self._parts:
            inside = columns < valid.shape[1]
            inside = inside if final is None else inside & final
            chosen.append(inside)
            places.append((rows * valid.shape[1] + columns)[inside])
        place = torch.cat(places)
        ids, margins = {}, {}
        for layer, first in self._parts[0][3].ids.items():
            decisions = [part[3].ids[layer][inside] for part, inside in zip(self._parts, chosen, strict=True)]
            gaps = [part[3].margins[layer][inside] for part, inside in zip(self._parts, chosen, strict=True)]
            # Distinct experts also where no token was run, so that the record can be replayed as it is.
            ids[layer] = torch.arange(first.shape[-1], dtype=first.dtype, device=first.device).repeat(*valid.shape, 1)
            ids[layer].view(-1, first.shape[-1])[place] = torch.cat(decisions)
            margins[layer] = torch.full(valid.shape, torch.inf, device=first.device)
            margins[layer].view(-1)[place] = torch.cat(gaps)
        return RoutingRecord(ids, margins, None if bool(valid.all()) else valid)


def valid_tokens(attention_mask: Tensor | None, prompt: int, made: Tensor) -> Tensor:
    """Returns bool [B, prompt + new], False for padding and behind the end of a row.

    Args:
        attention_mask: [B, prompt], nonzero for prompt tokens, or None.
        made: int64 [B], new tokens of each row.
    """
    valid = torch.arange(prompt + int(made.max()), device=made.device) < (prompt + made)[:, None]
    if attention_mask is not None:
        valid[:, :prompt] = attention_mask != 0
    return valid
