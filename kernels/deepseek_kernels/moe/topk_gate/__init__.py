"""`topk_gate`: the choice of K experts for each token, and their weights, for the three published routings.

Arguments of the routings, S the scores (TRAPS C3 to C8; V3 report, equations 12 to 16):

    greedy (V2-Lite)            S = softmax    no bias  1 group            normalize if asked for and K > 1
    group_limited_greedy (V2)   S = softmax    no bias  group_best=1       likewise; `factor` only if it does not
    noaux_tc (V3)               S = sigmoid    bias     group_best=2       normalize if asked for; `factor` always
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common import cpu
from . import reference
from .reference import group_scores, limit_to_groups, weigh

__all__ = ["group_scores", "limit_to_groups", "topk_gate", "weigh"]

dispatch.register("topk_gate", "triton", "cpu")
_MOST_EXPERTS = 1024  # a token's scores stay in the registers of one warp
_MOST_GROUPS = 32  # each is compared with each


def topk_gate(
    scores: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int = 1,
    normalize: bool = True,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts for each token and weighs them.

    Experts are chosen by `scores + bias`, among those of the `topk_group` groups with the best sum of their
    `group_best` best experts; the others count as -inf (TRAPS C4). Weights are those experts' scores, without the bias:
    divided by their sum (plus 1e-20) if `normalize`, then times `factor`.

    Equal experts, and equal groups, go to the smaller id; -0 equals 0, and NaN is larger than anything. That and a sum
    in float64 make both implementations give the same ids and weights bit by bit, for the same scores: that is why the
    operator takes scores and not logits, whose exponentials differ by device. (Weights further apart than 2^20 do not
    add exactly in float64: there, in some 10^8 of cases, a last bit may differ.)

    Args:
        scores: [T, E] float32 (float64 runs on the reference), E expert ids in groups of E / n_group neighbours.
        bias: [E] of the same dtype, or None. No gradient.
        group_best: 1 or 2.

    Returns:
        weights [T, top_k] in the dtype of scores, differentiable with respect to them, and ids [T, top_k] int64, both
        in order of falling preference.

    Raises:
        ValueError: a wrong shape or dtype, or more experts asked for than there are.
    """
    _check_operands(scores, bias)
    _check_numbers(scores.shape[1], top_k, n_group, topk_group, group_best)
    arguments = (scores, bias, top_k, (n_group, topk_group, group_best), normalize, factor)
    chosen = dispatch.pick("topk_gate", scores.device, _obstacle(scores, n_group))
    if chosen == "cpu" and scores.dtype == torch.float32 and not cpu.needs_gradient(scores):
        return torch.ops.deepseek_kernels_cpu.topk_gate(*arguments)
    if chosen != "triton":
        return reference.topk_gate(*arguments)
    from . import launch

    return launch.topk_gate(*arguments)


def _check_operands(scores: Tensor, bias: Tensor | None) -> None:
    if scores.ndim != 2 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64 scores [T, E], got {scores.dtype} {list(scores.shape)}")
    if bias is not None and (bias.shape != scores.shape[1:] or bias.dtype != scores.dtype):
        raise ValueError(
            f"expected {scores.dtype} bias [{scores.shape[1]}] or None, got {bias.dtype} {list(bias.shape)}"
        )


def _check_numbers(experts: int, top_k: int, n_group: int, topk_group: int, group_best: int) -> None:
    if n_group < 1 or experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(f"expected groups that divide {experts} experts, got {topk_group} of {n_group} groups")
    size = experts // n_group
    if group_best not in (1, 2) or (n_group > topk_group and group_best > size):
        raise ValueError(
            f"expected group_best 1 or 2, and no more than the {size} experts of a group, got {group_best}"
        )
    if not 1 <= top_k <= topk_group * size:
        raise ValueError(f"expected 1 <= top_k <= {topk_group * size} (the experts of the kept groups), got {top_k}")


def _obstacle(scores: Tensor, n_group: int) -> str | None:
    if scores.dtype != torch.float32:
        return f"its scores are float32, got {scores.dtype}"
    if scores.shape[1] > _MOST_EXPERTS:
        return f"it holds at most {_MOST_EXPERTS} experts, got {scores.shape[1]}"
    if n_group > _MOST_GROUPS:
        return f"it compares at most {_MOST_GROUPS} groups, got {n_group}"
    return None
