"""Auxiliary-loss-free load balancing: the bias updates of V3 and Moonlight. Notation: E routed experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..config.argument_types import check_types, shown
from .adapter_state import save_biases_with_adapters
from .expert_load import ExpertLoad
from .moe import Router
from .summed_loads import SummedLoads

__all__ = ["LoadBalancer", "expert_loads", "routers"]

_LARGEST_RATE = 1e30


def routers(model: nn.Module) -> dict[str, Router]:
    """Returns the routers of a model by module name, those of MTP modules included (TRAPS F9)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def expert_loads(model: nn.Module) -> dict[str, Tensor]:
    """Returns the counts of each router since the last step, int64 [E]; routers that saw no token are left out."""
    return {name: router.load for name, router in routers(model).items() if router.load is not None}


@check_types
class LoadBalancer:
    """Auxiliary-loss-free balancing (V3 report, section 2.1.2; arXiv 2408.15664): biases instead of gradients.

    Routers count, in training mode, the tokens that they really route; `step`, called after the optimizer's, moves each
    `e_score_correction_bias` against the load and empties the counts. Calling it once per optimizer step makes the
    update independent of gradient accumulation and recomputation (TRAPS D1, D3). Where torch.distributed runs, counts
    are summed over `group` first (TRAPS D2), all of them in one collective. A rank may hold a part of the layers (a
    pipeline stage): counts of the same decoder layer are summed, whatever its module is called there. Routers are
    looked up in each step, so that they may be wrapped meanwhile, on all ranks alike.

    Adapters of PEFT that are on the model save the moved biases with them (`adapter_state`), or a warning says that
    they do not. For it the first step sets their `bias` to "all", which has effects of its own, and says so.

    Args:
        model: any module tree with `Router`s; those without a bias (V2's routings) are counted and reported only.
        rate: gamma, a number or a function of the step (from 0). V3: 0.001, then 0 for the last 500B tokens. Freezing
            the biases, as is usual in fine-tuning, is rate 0.
        form: "sign", b += gamma sign(mean load - load), V3's; or "centred", which subtracts the mean of the signs from
            each, Moonlight's. Neither recentres what was loaded (TRAPS D4).
        group: the process group of all ranks that see different tokens; None for that of the model's layout, or the
            default one.

    Raises:
        ValueError: an unknown form, a rate that is negative or not finite, or a model without routers on the only rank.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float | Callable[[int], float] = 1e-3,
        form: str = "sign",
        group: Any | None = None,
    ) -> None:
        if form not in ("sign", "centred"):
            raise ValueError(f"expected form 'sign' or 'centred', got {form!r}")
        self._model = model
        if not self.routers and not _distributed():  # a pipeline stage of dense layers takes part all the same
            raise ValueError(f"expected a model with routers, got {type(model).__name__} without any")
        meshes: Any = getattr(model, "meshes", None)
        if group is None and meshes is not None:  # of `parallelize`
            group = meshes.data
        self.rate, self.form, self.group = rate, form, group
        self._over_ranks = SummedLoads()
        self.steps = 0
        if not callable(rate):
            _check_rate(rate)

    @property
    def routers(self) -> dict[str, Router]:
        """The model's routers by name, as they are now."""
        return routers(self._model)

    @torch.no_grad()
    def step(self) -> ExpertLoad:
        """Updates all biases once and returns the counts that it was made from.

        Warns if no router has counted a token: none ran in training mode with gradients since the last step.

        Raises:
            ValueError: the schedule gives a rate that is negative or not finite, or ranks hold routers that cannot be
                told apart; nothing is changed.
        """
        rate = _check_rate(self.rate(self.steps) if callable(self.rate) else self.rate)
        loads, all_routers = {}, self.routers
        counted = {name: router.load for name, router in all_routers.items()}
        if _distributed():
            counted = self._over_ranks.sum(self._model, all_routers, self.group)
        if rate:
            save_biases_with_adapters(self._model, all_routers)
        for name, router in all_routers.items():
            load, router.load = counted[name], None
            if load is None or not int(load.sum()):
                continue
            loads[name] = load
            bias = router.e_score_correction_bias
            if bias is not None and rate:
                bias += rate * self._direction(load).to(bias.device)
        self.steps += 1
        if not loads and all_routers:
            warnings.warn(
                "no router has counted a token since the last step, so that no bias was moved: expected forward passes "
                "in training mode, with gradients, through this package's routers",
                stacklevel=3,  # past the decorator
            )
        return ExpertLoad(loads, rate)

    def _direction(self, load: Tensor) -> Tensor:
        # In integers: a mean in floating point could turn the sign of an expert that has exactly its share.
        sign = torch.sign(load.sum() - load * len(load)).float()
        return sign - sign.mean() if self.form == "centred" else sign

    def state_dict(self) -> dict[str, int]:
        """Returns the step, for a rate schedule; the biases are in the model's own state dict."""
        return {"steps": self.steps}

    @check_types
    def load_state_dict(self, state: Mapping[str, int]) -> None:
        steps = state.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"expected the state of a LoadBalancer, steps >= 0, got {shown(state)}")
        self.steps = steps


def _check_rate(rate: float) -> float:
    # Biases are float32: a larger rate would make them infinite in one step.
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate <= _LARGEST_RATE:
        raise ValueError(f"expected a finite rate >= 0, got {shown(rate)}")
    return float(rate)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
