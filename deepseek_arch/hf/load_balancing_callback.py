"""Auxiliary-loss-free balancing in transformers' Trainer, and in everything built on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..moe.expert_load import ExpertLoad, LoadHistory
from ..moe.load_balancer import LoadBalancer
from .reference_refresh import refresh_copies_biases

__all__ = ["LoadBalancingCallback"]


class LoadBalancingCallback(TrainerCallback):
    """Moves router biases by the load after each optimizer step: `Trainer(..., callbacks=[LoadBalancingCallback()])`.

    The update comes once per optimizer step, whatever `gradient_accumulation_steps` is, with counts summed over all
    processes. The printed log and `state.log_history` get `max_violation`, the worst layer's; reporters that Trainer
    runs before its users' callbacks do not. The biases are part of the checkpoints that Trainer saves; a resumed run
    goes on with them, and with the step that a rate schedule needs. Adapters are saved with them, and a reference model
    that TRL refreshes (`sync_ref_model`) gets them.

    Args:
        rate, form: see `LoadBalancer`.

    Attributes:
        history: the loads of every step, for `history.heat_map`.
    """

    def __init__(self, rate: float | Callable[[int], float] = 1e-3, form: str = "sign") -> None:
        self.rate, self.form = rate, form
        self.history = LoadHistory()
        self.balancer: LoadBalancer | None = None
        self.report: ExpertLoad | None = None
        self._undo: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a model without routers."""
        self.balancer = LoadBalancer(model, self.rate, self.form)
        self.balancer.steps = state.global_step  # not 0 in a resumed run
        self._undo = refresh_copies_biases()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._undo is not None:
            self._undo()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.balancer is not None
        self.report = self.history.add(self.balancer.step())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and self.report is not None and self.report.loads:
            logs["max_violation"] = max(self.report.max_violation.values())
            if state.log_history:  # holds a copy, made before callbacks are asked
                state.log_history[-1]["max_violation"] = logs["max_violation"]
