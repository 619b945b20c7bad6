"""Recorded routing decisions, and the agreement of two records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.argument_types import check_types, shown

__all__ = ["Agreement", "RoutingRecord", "routing_agreement"]


@check_types
@dataclass
class RoutingRecord:
    """Every routing decision of a forward pass, to be inspected, kept, or replayed in another one.

    Attributes:
        ids: by layer index, int16 or int32 [B, T, K], the chosen experts in order of falling preference.
        margins: by layer index, float32 [B, T], the distance to another choice: the smaller of the gap between the
            last expert chosen and the best one not chosen within the kept groups, and the gap between the last group
            kept and the best one not kept. Infinite where there was nothing else to choose.
        valid: bool [B, T], False for padding; None where there is no padding.
    """

    ids: dict[int, Tensor]
    margins: dict[int, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T).

        Raises:
            ValueError: the record is empty, as that of a model without experts is, or holds no integers [B, T, K].
        """
        if not self.ids:
            raise ValueError("expected a record with at least one layer, got an empty one")
        shapes: set[tuple[int, int]] = set()
        for layer, ids in self.ids.items():
            if not isinstance(ids, Tensor) or ids.ndim != 3 or ids.is_floating_point() or ids.dtype == torch.bool:
                kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
                raise ValueError(f"expected integer decisions [B, T, K] for layer {shown(layer)}, got {kind}")
            shapes.add((ids.shape[0], ids.shape[1]))
        if len(shapes) > 1:
            raise ValueError(f"expected decisions for the same [B, T] tokens in all layers, got {sorted(shapes)}")
        return shapes.pop()

    def to(self, device: torch.device | str) -> RoutingRecord:
        """Returns a copy on another device."""

        def move(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {layer: tensor.to(device) for layer, tensor in tensors.items()}

        return RoutingRecord(move(self.ids), move(self.margins), None if self.valid is None else self.valid.to(device))

    def concat(self, later: RoutingRecord) -> RoutingRecord:
        """Returns this record with `later` behind it in each row: a prompt's and that of the tokens decoded after it.

        Raises:
            ValueError: the layers, the rows or the numbers of experts differ.
        """
        if self.ids.keys() != later.ids.keys() or self.shape[0] != later.shape[0]:
            raise ValueError(
                f"expected layers {sorted(self.ids)} and {self.shape[0]} rows, got layers {sorted(later.ids)} and "
                f"{later.shape[0]} rows"
            )

        for layer, ids in self.ids.items():
            if ids.shape[-1] != later.ids[layer].shape[-1]:
                chosen = ids.shape[-1], later.ids[layer].shape[-1]
                raise ValueError(f"expected as many experts a token in layer {layer}, got {chosen[0]} and {chosen[1]}")

        def join(first: dict[int, Tensor], second: dict[int, Tensor]) -> dict[int, Tensor]:
            both = {layer: (first[layer], second[layer].to(first[layer])) for layer in first if layer in second}
            return {layer: torch.cat(pair, 1) for layer, pair in both.items()}

        valid = None
        if self.valid is not None or later.valid is not None:
            parts = [
                record.valid if record.valid is not None else torch.ones(record.shape, dtype=torch.bool)
                for record in (self, later)
            ]
            valid = torch.cat([part.to(next(iter(self.ids.values())).device) for part in parts], 1)
        return RoutingRecord(join(self.ids, later.ids), join(self.margins, later.margins), valid)


@dataclass(frozen=True)
class Agreement:
    """Agreement of the routing of two passes over the same tokens, by layer index.

    Attributes:
        same: share of the tokens with the same set of experts.
        overlap: mean share of a token's experts that both chose.
        margin: median margin (of the first pass) of the tokens whose sets differ, None where none does: small margins
            are ties that rounding decided, large ones mean another model.
    """

    same: dict[int, float]
    overlap: dict[int, float]
    margin: dict[int, float | None]

    def __str__(self) -> str:
        lines = ["layer  same set  overlap  median margin of the others"]
        for layer in self.same:
            margin = self.margin[layer]
            lines.append(
                f"{layer:5d}  {self.same[layer]:8.2%}  {self.overlap[layer]:7.2%}  "
                + ("-" if margin is None else f"{margin:.3g}")
            )
        return "\n".join(lines)


@check_types
def routing_agreement(first: RoutingRecord, second: RoutingRecord) -> Agreement:
    """Compares two records of the same tokens: a trainer's with a rollout's, a quantized model's with the original's.

    Raises:
        ValueError: the layers or the shapes differ.
    """
    if first.ids.keys() != second.ids.keys():
        raise ValueError(f"expected records of the same layers, got {sorted(first.ids)} and {sorted(second.ids)}")
    if first.ids and first.shape != second.shape:
        raise ValueError(f"expected records of the same tokens, got {list(first.shape)} and {list(second.shape)}")
    same, overlap, margin = {}, {}, {}
    for layer, ids in first.ids.items():
        other = second.ids[layer]
        if ids.shape != other.shape:
            raise ValueError(f"expected records of the same tokens, got {list(ids.shape)} and {list(other.shape)}")
        ids, other = ids.long(), other.long().to(ids.device)
        common = (ids[..., :, None] == other[..., None, :]).any(-1).float().mean(-1)  # [B, T]
        valid = torch.ones_like(common, dtype=torch.bool) if first.valid is None else first.valid
        differs = (common < 1) & valid
        overlap[layer] = float(common[valid].mean())
        same[layer] = 1 - float(differs[valid].float().mean())
        margins = first.margins.get(layer)
        margin[layer] = float(margins[differs].median()) if margins is not None and bool(differs.any()) else None
    return Agreement(same, overlap, margin)
