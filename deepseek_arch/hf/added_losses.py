"""Losses that our models add to that of the next token: balance losses, and those of the MTP modules.

One place for the model's own forward and for TRL's, which replaces it on the instance: with `output_router_logits`,
TRL would compute Mixtral's balance loss instead of the family's, and leave the MTP modules untrained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..models.tensor_checks import as_int64
from .attention_mask import real_tokens
from .indexer_training import carry_loss, indexer_stage, indexer_weight, mean_recall
from .mtp_training import loss_weight, prediction_losses, share_of_items
from .outputs import DeepseekModelOutput

__all__ = ["AddedLosses", "added_losses", "own_losses", "replaces_the_head", "warms_up_modules"]


@dataclass
class AddedLosses:
    """Losses beside that of the next token, unweighted, and their weighted sum.

    Attributes:
        aux_loss: balance loss of the main model, where router logits were asked for.
        mtp_aux_loss: mean over MTP modules of theirs, its factor included, where router logits were asked for.
        mtp_losses, mtp_accuracy: float32 [D] by depth, where MTP modules ran.
        indexer_loss, indexer_recall: of sparse attention's indexers, where a stage of their training was asked for.
        alone: True in the dense stage, where `total` is the loss and not added to another one.
        total: what training adds to the loss; None where there are no labels, or nothing is to be added.
    """

    aux_loss: Tensor | None = None
    mtp_aux_loss: Tensor | None = None
    mtp_losses: Tensor | None = None
    mtp_accuracy: Tensor | None = None
    indexer_loss: Tensor | None = None
    indexer_recall: Tensor | None = None
    alone: bool = False
    total: Tensor | None = None

    @property
    def mtp_loss(self) -> Tensor | None:
        """Mean over depths, with the balance losses of the modules where they were computed."""
        if self.mtp_losses is None:
            return None
        mean = self.mtp_losses.mean()
        return mean if self.mtp_aux_loss is None else mean + self.mtp_aux_loss.to(mean.device)

    def with_loss(self, loss: Tensor) -> Tensor:
        """Returns the loss that a step trains on, given that of the next token."""
        if self.total is None:
            return loss
        total = self.total.to(loss.device)
        return total if self.alone else loss + total


def added_losses(
    model: Any,
    outputs: DeepseekModelOutput,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    num_items: Tensor | int | None,
    shift_labels: Tensor | None,
) -> AddedLosses:
    """Returns the losses of one pass of a `DeepseekForCausalLM`.

    Args:
        outputs: the main model's, with `router_logits` and `trunk` where their losses are wanted.
        labels: int64 [B, T], the tokens themselves; num_items, shift_labels: see `share_of_items`.
    """
    assert outputs.last_hidden_state is not None
    shape = (outputs.last_hidden_state.shape[0], outputs.last_hidden_state.shape[1])
    valid = real_tokens(attention_mask, shape[1])
    added = AddedLosses()
    if outputs.router_logits:
        added.aux_loss = model.balance_loss(outputs.router_logits, shape, valid)
    if outputs.trunk is not None and input_ids is not None and labels is not None:
        added.mtp_losses, added.mtp_accuracy, more = prediction_losses(
            model,
            outputs.trunk,
            as_int64("input_ids", input_ids),
            labels,
            valid,
            balanced=added.aux_loss is not None,
            selection=outputs.selection,
        )
        if more is not None:
            added.mtp_aux_loss = model.router_aux_loss_coef * more
    if outputs.selection is not None:
        added.indexer_loss = outputs.selection.total_loss()
        added.indexer_recall = mean_recall(outputs.selection)
    targets = labels if labels is not None else shift_labels
    if targets is None:
        return added
    share = share_of_items(targets, num_items, shift_labels)
    if outputs.selection is not None and added.indexer_loss is not None and outputs.selection.stage == "dense":
        added.alone, added.total = True, indexer_weight(model) * share * added.indexer_loss
        return added
    terms = [] if added.aux_loss is None else [model.router_aux_loss_coef * share * added.aux_loss]
    if added.mtp_loss is not None and model.training:
        terms.append(loss_weight(model) * share * added.mtp_loss)
    if added.indexer_loss is not None and model.training:
        terms.append(indexer_weight(model) * share * added.indexer_loss)
    if terms:
        added.total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
    return added


def replaces_the_head(forward: Any) -> bool:
    """Returns True for TRL's forward with a fused head, as it sets it on a model."""
    return isinstance(forward, MethodType) and "fused_lm_head" in forward.__func__.__code__.co_varnames


def own_losses(forward: MethodType) -> MethodType:
    """Wraps TRL's forward with a fused head so that our losses are added, and none of another family's."""
    function = forward.__func__  # unbound: a deep copy of the model binds the wrapper to the copy

    def with_own_losses(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return function(self, *args, **kwargs)
        labels, ids, seen = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None), []
        asked = kwargs.pop("output_router_logits", None)
        balanced = getattr(self.config, "output_router_logits", False) if asked is None else asked
        stage = None if labels is None else indexer_stage(self)
        predicts = labels is not None and ids is not None and (loss_weight(self) > 0 or warms_up_modules(self, stage))
        if stage is not None:
            kwargs["use_cache"] = False
        handles = (
            self.model.register_forward_pre_hook(_asking(balanced, predicts, stage), with_kwargs=True),
            self.model.register_forward_hook(lambda module, args, output: seen.append(output)),
        )
        try:
            out = function(self, *args, output_router_logits=False, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        more = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        # Others may have asked the main model for more than these losses read, and then add it themselves.
        main = DeepseekModelOutput(
            last_hidden_state=seen[-1].last_hidden_state,
            router_logits=seen[-1].router_logits if balanced else None,
            trunk=seen[-1].trunk if predicts else None,
            selection=seen[-1].selection,
        )
        added = added_losses(self, main, ids, kwargs.get("attention_mask"), labels, *more)
        out.aux_loss = added.aux_loss
        if out.loss is not None:
            out.loss = added.with_loss(out.loss)
        if added.indexer_loss is not None and self.training and getattr(out, "log_probs", None) is not None:
            shifted = kwargs.get("shift_labels")
            counted = (labels[:, 1:] if shifted is None else shifted) != -100  # type: ignore[index]
            out.log_probs = carry_loss(out.log_probs, counted, indexer_weight(self) * added.indexer_loss, added.alone)
        return out

    return MethodType(with_own_losses, forward.__self__)


def warms_up_modules(model: Any, stage: str | None) -> bool:
    """Returns True where MTP modules run for their indexers alone, whatever their own loss weighs."""
    return stage == "dense" and len(model.mtp) > 0


def _asking(balanced: bool, predicts: bool, stage: str | None) -> Callable[..., Any]:
    """Returns a hook that asks the main model for what the added losses need."""

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        more = {"output_router_logits": balanced, "return_trunk": predicts}
        more = {name: asked or bool(kwargs.get(name)) for name, asked in more.items()}
        return args, kwargs | more | ({} if stage is None else {"indexer_stage": stage})

    return ask
