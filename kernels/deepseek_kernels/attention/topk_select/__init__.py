"""`topk_select`: the keys that sparse attention reads, for each query those with the best scores.

B batch, T queries, S keys, K keys of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.masks import check_visibility
from . import cpu, reference
from .configs import MOST, MOST_CHOSEN

__all__ = ["topk_select"]

dispatch.register("topk_select", "triton", "cpu")


def topk_select(scores: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """Selects the `top_k` best keys among those that a query sees, or all of these where they are no more.

    The choice is the same in every run and implementation (TRAPS G7): of equal scores, those with the smaller index;
    -0 equals 0, and NaN counts as +inf. Scores of keys that a query does not see are not looked at, whatever they are
    (TRAPS G5); a seen key whose score is -inf may be selected.

    Args:
        scores: [B, T, S] float32 (float64 runs on the reference).
        top_k: at least 1.
        mask: None for causal, spans or bool, as `deepseek_kernels.common.masks` describes; not additive.

    Returns:
        int32 [B, T, K], K = min(top_k, S): indices of keys in rising order, then -1 where a query sees less than K.
        In a program of torch.export, which may run on any number of keys, K is `top_k`.

    Raises:
        ValueError: a wrong shape or dtype, or `top_k` is less than 1.
    """
    if scores.ndim != 3 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64 scores [B, T, S], got {scores.dtype} {list(scores.shape)}")
    if top_k < 1:
        raise ValueError(f"expected top_k >= 1, got {top_k}")
    check_visibility(mask, *scores.shape)
    chosen = dispatch.pick("topk_select", scores.device, _unsupported(scores, top_k))
    if chosen == "cpu" and cpu.takes(scores):
        return cpu.select(scores.detach(), top_k, mask)
    if chosen != "triton":
        return reference.select(scores.detach(), top_k, mask)
    from . import launch

    return launch.select(scores.detach(), top_k, mask)


def _unsupported(scores: Tensor, top_k: int) -> str | None:
    """Returns the reason why the kernels cannot take these operands, or None."""
    if scores.dtype != torch.float32:
        return f"its scores are float32, got {scores.dtype}"
    if top_k > MOST_CHOSEN and scores.shape[2] > MOST:
        return f"it selects at most {MOST_CHOSEN} of more than {MOST} keys, got {top_k} of {scores.shape[2]}"
    return None
