"""The choice of experts in plain PyTorch: stable sorts, since topk leaves the order of equal scores to the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["choose", "group_scores", "limit_to_groups", "topk_gate", "weigh"]


def topk_gate(
    scores: Tensor, bias: Tensor | None, top_k: int, groups: tuple[int, int, int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """See the operator; `groups` are its n_group, topk_group and group_best."""
    own = scores.detach() if scores.requires_grad else scores
    choice = own if bias is None else own + bias.detach()
    ids = choose(choice, top_k, *groups)
    return weigh(scores, ids, normalize, factor), ids


def choose(choice: Tensor, top_k: int, n_group: int, topk_group: int, group_best: int) -> Tensor:
    """Returns the ids [T, K] of the best of [T, E], the smaller id first among equals."""
    if topk_group < n_group:
        choice = limit_to_groups(choice, group_scores(choice, n_group, group_best), topk_group)
    if type(choice) is not Tensor and torch.onnx.is_in_onnx_export():
        return choice.topk(top_k, dim=-1).indices  # ONNX has no stable sort, and its TopK orders equals as one
    return torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]


def group_scores(choice: Tensor, n_group: int, group_best: int) -> Tensor:
    """Returns the scores [T, G] by which groups are chosen, each the sum of its `group_best` best of [T, E]."""
    return choice.reshape(-1, n_group, choice.shape[-1] // n_group).topk(group_best, dim=-1).values.sum(-1)


def limit_to_groups(choice: Tensor, scores: Tensor, topk_group: int) -> Tensor:
    """Returns [T, E] with -inf in all but the `topk_group` groups with the best scores [T, G]."""
    if type(scores) is not Tensor and torch.onnx.is_in_onnx_export():
        kept = scores.topk(topk_group, dim=-1).indices
    else:
        kept = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :topk_group]
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)
    # -inf, not 0: biased scores can be negative (TRAPS C4).
    groups = choice.reshape(*scores.shape, choice.shape[-1] // scores.shape[-1])
    return groups.masked_fill(~keep[..., None], float("-inf")).reshape(choice.shape)


def weigh(scores: Tensor, ids: Tensor, normalize: bool, factor: float) -> Tensor:
    """Returns the weights [T, K] of the chosen `ids`, which may be any."""
    weights = scores.gather(-1, ids)
    if normalize:
        # In float64 the sum is exact, so that its order, the device's own, does not matter.
        total = weights.sum(-1, keepdim=True, dtype=torch.float64) + 1e-20
        weights = weights / total.to(weights.dtype)
    return weights * factor
