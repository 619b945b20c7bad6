"""Embedding and head cut by vocabulary, with a loss that neither gathers nor keeps logits.

Notation: N rows, H hidden size, V vocabulary, of which this rank has the ids from `first` on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..models.losses import IGNORE
from .collectives import copy_in, gather_last, reduce_over, sum_out

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabularyEmbedding", "VocabularyHead"]

PURPOSE = "tensor parallel"
_ROWS = 1024  # of logits that exist at a time


class VocabularyEmbedding:
    """Looks up this rank's ids, and sums over ranks."""

    group: ProcessGroup

    def forward(self, input_ids: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        local = input_ids - dist.get_rank(self.group) * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), weight)
        return sum_out(rows.masked_fill(elsewhere[..., None], 0.0), self.group, PURPOSE)


class VocabularyHead:
    """Makes logits of this rank's ids; called, it gathers those of all."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        local = super().forward(copy_in(x, self.group, PURPOSE))  # type: ignore[misc]
        return gather_last(local, self.group, "logits")

    def losses(
        self, states: Sequence[Tensor], targets: Sequence[Tensor], *, detached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Computes `head_losses` from local logits, of which a chunk of rows exists at a time."""
        rows = copy_in(torch.cat([state.flatten(0, -2) for state in states]), self.group, PURPOSE)
        labels = torch.cat([target.flatten() for target in targets]).to(rows.device)
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        each, right = _CrossEntropy.apply(rows, weight.detach() if detached else weight, labels, self.group)
        sizes = [target.numel() for target in targets]
        counts = torch.stack([(part != IGNORE).sum() for part in labels.split(sizes)]).clamp(min=1)
        losses = torch.stack([part.sum() for part in each.split(sizes)]) / counts
        return losses.float(), torch.stack([part.sum() for part in right.split(sizes)]) / counts


def _chunks(rows: Tensor, weight: Tensor, labels: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yields, for a chunk of rows, its logits in float32 at least, the local target ids, and which rows have one."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        local = labels[part] - first
        here = (local >= 0) & (local < weight.shape[0]) & (labels[part] != IGNORE)
        yield part, (rows[part] @ weight.T).to(wide), local.masked_fill(~here, 0), here


class _CrossEntropy(torch.autograd.Function):
    """Loss of each row, 0 where ignored, and whether its target has the largest logit.

    Three numbers a row travel: the largest logit, the sum of exponentials, and the target's logit.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        ctx.first = dist.get_rank(group) * weight.shape[0]
        wide = torch.promote_types(rows.dtype, torch.float32)
        best, total, target = rows.new_zeros(3, len(rows), dtype=wide).unbind()
        for part, logits, local, here in _chunks(rows, weight, labels, ctx.first):
            best[part] = logits.amax(-1)
            total[part] = (logits - best[part, None]).exp().sum(-1)
            target[part] = logits.gather(-1, local[:, None])[:, 0] * here
        largest = reduce_over(best.clone(), group, PURPOSE, dist.ReduceOp.MAX)
        total = reduce_over(total * (best - largest).exp(), group, PURPOSE)
        target = reduce_over(target, group, PURPOSE)
        normalizer, counted = largest + total.log(), labels != IGNORE
        ctx.save_for_backward(rows, weight, labels, normalizer)
        right = (target >= largest) & counted
        ctx.mark_non_differentiable(right)
        return ((normalizer - target) * counted).to(wide), right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, normalizer = ctx.saved_tensors
        scale = grads[0] * (labels != IGNORE)
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        # Summed in float32: each chunk's part would be rounded away in a sum of 16 bits.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for part, logits, local, here in _chunks(rows, weight, labels, ctx.first):
            grad = (logits - normalizer[part, None]).exp()
            grad.scatter_add_(1, local[:, None], -here[:, None].to(grad.dtype))
            grad = (grad * scale[part, None]).to(rows.dtype)
            if grad_rows is not None:
                grad_rows[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ rows[part]
        return grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
