"""Moving tokens to their experts and back: `sort_by_expert`, `permute`, `unpermute`.

Both movements are gathers in either direction, forward and backward, or write each row once: nothing depends on the
order in which atomics land, and both implementations give the same bits, the gradient of the weights excepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from . import cpu, reference

__all__ = ["permute", "sort_by_expert", "unpermute"]

dispatch.register("moe_permute", "triton", "cpu")
_ROWS = (torch.bfloat16, torch.float16, torch.float32)
_COPIED = (*_ROWS, torch.uint8)  # FP8 values, which are only copied


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts (token, choice) pairs by expert, ties in token order.

    Args:
        expert_ids: [T, K] int64 in [0, num_experts]; num_experts itself marks a choice that no expert here serves.

    Returns:
        order: [T * K] int64, the pair (as `token * K + choice`) at each sorted row.
        inverse: [T, K] int64, the sorted row of each pair.
        ends: [num_experts] int64, one past each expert's last row.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    if expert_ids.ndim != 2 or expert_ids.dtype != torch.int64:
        raise ValueError(f"expected int64 expert_ids [T, K], got {expert_ids.dtype} {list(expert_ids.shape)}")
    return _implementation(expert_ids, None).sort_by_expert(expert_ids, num_experts)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Gathers each token once per chosen expert, sorted by expert.

    Args:
        x: [T, H].
        order: [T * K] int64 from `sort_by_expert`.
        inverse: [T, K] int64 from `sort_by_expert`.

    Returns:
        [T * K, H].

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(x, inverse.shape[:1], order, inverse)
    return _implementation(x, _obstacle(x, dtypes=_COPIED), None, order, inverse).permute(x, order, inverse)


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Returns the weighted sum of each token's expert outputs, accumulated in float32 and rounded once (TRAPS C9).

    Args:
        y: [T * K, H], sorted by expert.
        weights: [T, K] float32 routing weights.
        order, inverse: from `sort_by_expert`.

    Returns:
        [T, H] in `y.dtype`, summed in the order of choices.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(y, order.shape, order, inverse)
    if weights.shape != inverse.shape:
        raise ValueError(f"expected weights {list(inverse.shape)}, got {list(weights.shape)}")
    others = weights, order, inverse
    return _implementation(y, _obstacle(y, weights), *others).unpermute(y, *others)


def _check(rows: Tensor, count: torch.Size, order: Tensor, inverse: Tensor) -> None:
    if inverse.ndim != 2 or order.shape != (inverse.numel(),) or rows.ndim != 2 or rows.shape[:1] != count:
        raise ValueError(
            f"expected rows [{', '.join(map(str, count))}, H] beside order [T * K] and inverse [T, K], "
            f"got {list(rows.shape)}, {list(order.shape)}, {list(inverse.shape)}"
        )


def _obstacle(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = _ROWS) -> str | None:
    wrong = next((x.dtype for x in tensors if x.dtype not in dtypes), None)
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return None if wrong is None else f"its rows and weights are {names}, got {wrong}"


def _implementation(x: Tensor, unsupported: str | None, weights: Tensor | None = None, *ids: Tensor):
    chosen = dispatch.pick("moe_permute", x.device, unsupported)
    if chosen == "cpu" and ids and cpu.takes(x, weights, *ids):
        return cpu
    if chosen != "triton":
        return reference
    from . import launch

    return launch
