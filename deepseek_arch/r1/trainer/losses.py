"""Losses beside the policy's: drafts of the prediction layers, and the balance of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...hf import DeepseekModel
from ...hf.mtp_training import prediction_losses
from .config import R1Config, base_model

__all__ = ["added_losses", "losses_of", "watching_trunk"]


@contextmanager
def watching_trunk(model: Any, args: Any) -> Iterator[dict[str, Any]]:
    """Asks the trunk for what the added losses of `args` read, and yields a dict that the pass fills.

    TRL replaces the model's forward by one that calls the trunk alone (TRAPS T1): the trunk is where to ask.
    """
    seen: dict[str, Any] = {}
    if not (args.mtp_loss_weight or args.balance_loss) or not model.training:
        yield seen
        return
    trunk = next(module for module in model.modules() if isinstance(module, DeepseekModel))

    def before(module: Any, positional: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        more = {"return_trunk": bool(args.mtp_loss_weight), "output_router_logits": bool(args.balance_loss)}
        return positional, keywords | more

    def after(module: Any, positional: Any, output: Any) -> None:
        seen["trunk"], seen["router_logits"] = output.trunk, output.router_logits

    hooks = [trunk.register_forward_pre_hook(before, with_kwargs=True), trunk.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def added_losses(
    model: Any, args: R1Config, seen: dict[str, Any], inputs: dict[str, Tensor]
) -> dict[str, tuple[float, Tensor]]:
    """Returns weight and value of each added loss: the balance of all tokens, drafts of the completions."""
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
    valid = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1).bool()
    labels = ids.masked_fill(~valid, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    return losses_of(base_model(model), args, seen, ids, labels, valid)


def losses_of(
    base: Any, args: Any, seen: dict[str, Any], ids: Tensor, labels: Tensor, valid: Tensor
) -> dict[str, tuple[float, Tensor]]:
    """Returns weight and value of each loss that `args` adds: the balance of all tokens, drafts of the labels.

    Args:
        base: the model without adapters around it.
        seen: the main model's outputs, from `watching_trunk`.
        ids, labels: int64 [B, T]; valid: bool [B, T].
    """
    out = {}
    if args.balance_loss:
        value = base.balance_loss(seen["router_logits"], tuple(ids.shape), valid)
        out["balance_loss"] = args.balance_loss, value
    if args.mtp_loss_weight:
        base.mtp_detached = True
        losses, _, _ = prediction_losses(base, seen["trunk"], ids, labels, valid, balanced=False)
        out["mtp_loss"] = args.mtp_loss_weight, losses.mean()
    return out
