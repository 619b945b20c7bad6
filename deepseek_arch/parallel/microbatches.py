"""Batches cut into microbatches, whose losses add up to those of the whole batch of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.global_loss import LossShares
from ..models.losses import ignore
from ..models.mtp_loss import count_targets
from ..models.tensor_checks import as_int64, nonzero
from .call_agreement import agree_on_call
from .stages import Microbatch

__all__ = ["agreed_shares", "cut_batch"]


def cut_batch(
    model: Any, input_ids: Tensor, labels: Tensor, mask: Tensor | None, position_ids: Tensor | None, count: int
) -> list[Microbatch]:
    """Cuts [B, T] tensors into microbatches of consecutive rows; `shares` are the numbers of targets and rows."""
    rows, device = len(input_ids) // count, input_ids.device
    depths, parts = model.config.num_nextn_predict_layers, []
    own_tokens = model.model.part_of(input_ids.shape[1]) if model.meshes.layout.cp > 1 else None
    if position_ids is not None:
        position_ids = as_int64("position_ids", position_ids).expand(len(input_ids), -1)
    for first in range(0, len(input_ids), rows):
        own = slice(first, first + rows)
        given = None if mask is None else mask[own]
        valid = None if given is None else nonzero(given)
        positions = None if position_ids is None else position_ids[own]
        places = model.model.places(valid, positions, rows, input_ids.shape[1], device)
        padding = None if valid is None else ~valid
        counts = count_targets(ignore(labels[own], padding), padding, places.documents, depths)
        shares = LossShares(counts.targets, counts.sequences)
        parts.append(Microbatch(input_ids[own], labels[own], given, places, shares, own_tokens))
    return parts


def agreed_shares(
    parts: list[Microbatch], count: int, model: Any, problem: Exception | None, mark: Tensor
) -> list[Microbatch]:
    """Returns microbatches whose shares are those in the mean over the data-parallel ranks' losses.

    Every rank calls this once a step, with one collective of a few numbers.

    Args:
        parts: `cut_batch`, or none with a problem.
        problem: what is wrong with this rank's arguments.
        mark: their `fingerprint`.

    Raises:
        ValueError: as `agree_on_call`, on all ranks.
    """
    depths, device = model.config.num_nextn_predict_layers, model.device
    own = torch.zeros(count, 2, 1 + depths, dtype=torch.int64, device=device)
    if problem is None:
        own = torch.stack([torch.stack(tuple(part.shares)) for part in parts]).to(device)
    total = agree_on_call(model.meshes, problem, mark, own.sum(0).flatten())
    ranks = dist.get_world_size(model.meshes.data)
    # Ranks that share tokens have counted them each.
    alike = dist.get_world_size() // (ranks // model.meshes.layout.cp)
    whole = total.double().view(2, -1) / alike
    shares = (own.cpu() * model.meshes.layout.dp / whole.clamp(min=1)).float()
    return [part._replace(shares=LossShares(*share)) for part, share in zip(parts, shares, strict=True)]
