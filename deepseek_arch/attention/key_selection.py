"""Selections of keys during one pass of a model with sparse attention: shared, recorded, and learned from."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..config.argument_types import shown

__all__ = ["STAGES", "KeySelection"]

STAGES = (None, "dense", "sparse")


class KeySelection:
    """The selections of one pass, by decoder layer.

    Layers write to it under their own number, and a layer that runs again in the backward pass to one of its own
    (`separate`): running again changes nothing.

    Args:
        record: keeps the selection of every layer, not only of those whose selection another layer shares.
        stage: None; or the stage of the indexers' training (V3.2 report, section 2.1), whose loss every layer with an
            indexer then adds: "dense" (warm-up: attention is dense, the loss is over all keys) or "sparse" (attention
            is sparse, the loss is over the selected keys).

    Attributes:
        ids: int32 [B, T, K] of each layer kept, as of `deepseek_kernels.topk_select`.
        losses: float32 scalars, one for each layer with an indexer: the mean over real tokens of the KL divergence of
            the indexer's distribution over keys from that of the attention.
        recall: float32 scalars, of stage "dense": the attention's mass on the keys that the indexer selects, relative
            to the mass on the best choice of as many.
        valid: bool [B, T], False for padding, or None.

    Raises:
        ValueError: the stage is none of these, or `record` is no bool.
    """

    def __init__(self, *, record: bool = False, stage: str | None = None) -> None:
        # By hand: a compiled pass makes one of these, and Dynamo does not follow `check_types`.
        if not isinstance(record, bool):
            raise ValueError(f"expected record to be True or False, got {shown(record)}")
        if not isinstance(stage, str | None) or stage not in STAGES:
            raise ValueError(f"expected stage None, 'dense' or 'sparse', got {shown(stage)}")
        self.recording, self.stage = record, stage
        self.ids: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}
        self.recall: dict[int, Tensor] = {}
        self.valid: Tensor | None = None
        self._before: dict[int, Tensor] = {}  # of layers that ran before this object was separated

    def separate(self) -> KeySelection:
        """Returns the same settings with no results yet: those of one layer, until `join` adds them."""
        part = copy.copy(self)
        part._before = self.ids
        part.ids, part.losses, part.recall = {}, {}, {}
        return part

    def join(self, part: KeySelection) -> None:
        """Adds the results of what `separate` returned."""
        self.ids.update(part.ids)
        self.losses.update(part.losses)
        self.recall.update(part.recall)

    def of(self, layer_idx: int) -> Tensor:
        """Returns the selection of a layer before.

        Raises:
            ValueError: it has made none.
        """
        for ids in (self.ids, self._before):
            if layer_idx in ids:
                return ids[layer_idx]
        raise ValueError(f"expected a selection of keys by layer {layer_idx}, which a later one shares, got none")

    def total_loss(self) -> Tensor | None:
        """Returns the sum of the layers' losses, or None without any."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else None
