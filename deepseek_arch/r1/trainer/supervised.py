"""Supervised fine-tuning with TRL: drafts and balance go on beside the language model's loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from ...hf import LoadBalancingCallback
from .config import base_model, check_extras, wait_for_drafts
from .losses import losses_of, watching_trunk

__all__ = ["R1SFTConfig", "R1SFTTrainer"]


@dataclass
class R1SFTConfig(SFTConfig):
    """TRL's `SFTConfig`, every field of it, and what keeps drafts and experts as good as they were."""

    balance_rate: float = field(
        default=0.0,
        metadata={"help": "Step of the routers' biases against the load (V3 report, 2.1.2); 0 freezes them."},
    )
    balance_loss: float = field(
        default=0.0,
        metadata={"help": "Factor of V3's sequence-wise balance loss (TRL's router_aux_loss_coef is Mixtral's)."},
    )
    mtp_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the prediction layers' loss, which trains them alone: TRL's fused head passes the "
            "model's own loss by (TRAPS T2)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("balance_rate", "balance_loss", "mtp_loss_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        wait_for_drafts(self)


class R1SFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with detached prediction layers, V3's balance loss, and biases that follow the load.

    Raises:
        ValueError: a model without experts or prediction layers, if one of the arguments needs them.
    """

    args: R1SFTConfig
    model: Any

    def __init__(self, model: Any, args: R1SFTConfig, callbacks: Any = None, **kwargs: Any) -> None:
        callbacks = list(callbacks or [])
        if args.balance_rate:
            callbacks.append(LoadBalancingCallback(args.balance_rate))
        super().__init__(model, args=args, callbacks=callbacks, **kwargs)
        self._policy = self.accelerator.unwrap_model(self.model)
        check_extras(self._policy, args)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL's, with the added losses."""
        function = super().compute_loss
        if not self.model.training or return_outputs:
            return function(model, inputs, return_outputs, num_items_in_batch)
        labels, ids = inputs["labels"], inputs["input_ids"]
        valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
        with watching_trunk(self._policy, self.args) as seen:
            loss = function(model, inputs, False, num_items_in_batch)
        # TRL counts from where a run was resumed, so a resumed run would log other numbers.
        self._metrics["train"].pop("num_tokens", None)
        if seen:
            loss = loss + self._added(seen, ids, labels, valid) / self.current_gradient_accumulation_steps
        return loss

    def _added(self, seen: dict[str, Any], ids: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        total = ids.new_zeros((), dtype=torch.float32)
        values = losses_of(base_model(self._policy), self.args, seen, ids, labels, valid)
        for name, (weight, value) in values.items():
            total = total + weight * value
            self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
        return total
