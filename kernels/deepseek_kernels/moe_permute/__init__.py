"""Moving tokens to their experts and back: `sort_by_expert`, `permute`, `unpermute`.

Both movements are gathers in either direction, forward and backward, so that nothing depends on the order in which
atomics land.
"""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from .reference import Permute, Unpermute, sort_by_expert

__all__ = ["permute", "sort_by_expert", "unpermute"]

dispatch.register("moe_permute")


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Gathers each token once per chosen expert, sorted by expert.

    Args:
        x: [T, H].
        order: [T * K] int64 from `sort_by_expert`.
        inverse: [T, K] int64 from `sort_by_expert`.

    Returns:
        [T * K, H].
    """
    dispatch.pick("moe_permute")
    return Permute.apply(x, order, inverse)


def unpermute(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The weighted sum of each token's expert outputs, accumulated in float32 and rounded once (TRAPS C9).

    Args:
        y: [T * K, H], sorted by expert.
        weights: [T, K] float32 routing weights.
        order, inverse: from `sort_by_expert`.

    Returns:
        [T, H] in `y.dtype`.
    """
    dispatch.pick("moe_permute")
    return Unpermute.apply(y, weights, order, inverse)
