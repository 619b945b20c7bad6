"""`linear_cross_entropy`: the head's product and the cross-entropy of its logits, which never exist all at once.

DeepSeek-V3's head makes 129280 logits a token: 8192 tokens are 2.1 GB in bfloat16, and the float32 copies that a plain
cross-entropy keeps for its gradient are several times that. Chunks of tokens need the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch
from . import reference
from .configs import chunk_bytes

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

dispatch.register("linear_cross_entropy", "triton")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LinearCrossEntropy(NamedTuple):
    """Result of `linear_cross_entropy`; scalars, or [S] with segments.

    Attributes:
        loss: float32 (float64 for float64 operands), summed or averaged over the targets that are not ignored.
        correct: int64, number of targets with the greatest logit of their row, the first of equal ones. A row whose
            loss is NaN is not right.
        count: int64, number of targets that are not ignored.
    """

    loss: Tensor
    correct: Tensor
    count: Tensor  # type: ignore[assignment]  # of the tuple's own method, which no caller needs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: str = "sum",
    segments: Sequence[int] | None = None,
) -> LinearCrossEntropy:
    """Computes `F.cross_entropy(F.linear(hidden, weight).float(), targets)`, and counts the targets that are predicted.

    Only `loss` carries gradients, to `hidden` and `weight`. They are computed with the loss, in the forward pass, and
    kept until backward scales them: in memory, [T, H] in `hidden.dtype` and, unless the weight is frozen, S times
    [V, H] float32. There are no second derivatives: asking for them raises.

    Several heads with one weight (multi-token prediction) take one call: their rows one after the other, `segments`
    their lengths. Each has its own loss, which may be weighted at will afterwards.

    Args:
        hidden: [T, H], float32, bfloat16 or float16 (and float64, by the reference). Under autocast, cast as by
            `F.linear`.
        weight: [V, H], of the same dtype.
        targets: int64 [T], in [0, V) or `ignore_index`. Ignored rows have no loss and zero gradients, whatever they
            hold. On a GPU, a target that is out of range makes the loss NaN.
        chunk: tokens whose logits exist at a time; None for a rule of sizes.
        reduction: "sum", or "mean" over the targets that are not ignored; 0 where there are none.
        segments: lengths that add up to T; None for one result over all rows.

    Raises:
        ValueError: a shape, dtype or length does not fit; on a CPU, a target is out of range.
    """
    _check(hidden, weight, targets, chunk, reduction)
    lengths = [hidden.shape[0]] if segments is None else list(segments)
    if any(length < 0 for length in lengths) or sum(lengths) != hidden.shape[0]:
        raise ValueError(f"expected segments that add up to {hidden.shape[0]}, got {lengths}")
    _check_targets(targets, weight.shape[0], ignore_index)
    hidden, weight = dispatch.autocast(hidden, weight)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"expected hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}")
    enabled = torch.is_grad_enabled()
    needs = [enabled and hidden.requires_grad, enabled and weight.requires_grad]
    unsupported = None if hidden.dtype in _FLOATS else f"it takes float32, bfloat16 or float16, got {hidden.dtype}"
    if dispatch.pick("linear_cross_entropy", hidden.device, unsupported) == "reference":
        run, budget, width = reference.linear_cross_entropy_reference, reference.CHUNK_BYTES, 4
    else:
        from . import launch

        run, budget, width = launch.linear_cross_entropy_triton, chunk_bytes(needs[1]), hidden.element_size()
    chunk = _chunk(weight.shape[0] * width, budget) if chunk is None else chunk
    loss, correct, count, _, _ = run(hidden, weight, targets, lengths, ignore_index, chunk, needs)
    if reduction == "mean":
        loss = loss / count.clamp(min=1)
    result = LinearCrossEntropy(loss, correct, count)
    return LinearCrossEntropy(*(value[0] for value in result)) if segments is None else result


def _chunk(row_bytes: int, budget: int) -> int:
    """Returns the tokens whose logits fit into `budget` bytes, in multiples of a product's tile of rows."""
    rows = budget // max(row_bytes, 1)
    return rows // 128 * 128 if rows >= 128 else max(rows, 16)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None, reduction: str) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"expected int64 targets [{hidden.shape[0]}], got {targets.dtype} {list(targets.shape)}")
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"expected hidden and weight of floats, got {hidden.dtype} and {weight.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected a chunk of at least one token, got {chunk}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"expected reduction 'sum' or 'mean', got {reduction!r}")


def _check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    # On an accelerator the comparison would wait for the device.
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
    if wrong.numel():
        raise ValueError(f"expected targets of {ignore_index} or between 0 and {classes - 1}, got {int(wrong[0])}")
