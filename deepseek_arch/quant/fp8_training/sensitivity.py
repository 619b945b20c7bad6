"""Sensitivity of the loss to FP8, by layer: the error that each weight's FP8 GEMMs alone add to it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...config.argument_types import check_types
from .convert import assign, install, weights_of
from .policy import V3_RECIPE, FP8Policy

__all__ = ["Sensitivity", "SensitivityRow", "fp8_sensitivity"]

Loss = Callable[[nn.Module, Any], Tensor]
MTP_WEIGHT = 0.3  # V3's for most of its training


@dataclass(frozen=True)
class SensitivityRow:
    """Change of the loss when these weights alone are in FP8.

    Attributes:
        name: the weight, or the layer that the weights belong to.
        weights: names as in a policy.
        change: mean over batches of the loss in FP8 less the loss in high precision.
        error: mean over batches of the magnitude of that difference: rounding may lower a loss by chance.
        gradient_error: norm of the difference of all parameters' gradients, relative to the norm in high precision,
            mean over batches; None if it was not asked for.
    """

    name: str
    weights: tuple[str, ...]
    change: float
    error: float
    gradient_error: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """The rows, worst first.

    Attributes:
        base: mean loss in high precision.
        policy: source of the rows' precisions.
    """

    rows: tuple[SensitivityRow, ...]
    base: float
    policy: FP8Policy

    def keeping_high(self, worst: int | None = None, *, above: float | None = None) -> FP8Policy:
        """Returns the policy with some rows in high precision.

        Args:
            worst: number of first rows, or
            above: fraction of the loss, for rows whose error is more.

        Raises:
            ValueError: both or neither, or a negative number.
        """
        if (worst is None) == (above is None) or (worst or 0) < 0 or (above or 0) < 0:
            raise ValueError(f"expected either worst or above, and not negative, got {worst} and {above}")
        if above is None:
            chosen: Sequence[SensitivityRow] = self.rows[:worst]
        else:  # "not at most", so that a NaN is above everything
            chosen = [row for row in self.rows if not row.error <= above * abs(self.base)]
        return self.policy.keeping_high(name for row in chosen for name in row.weights)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"loss in high precision {self.base:.6g}; changes by FP8 in one place alone:"]
        for row in self.rows:
            line = f"{row.name:<{width}}  error {row.error:.3g} ({_percent(row.error, self.base)})"
            line += f"  change {row.change:+.3g}"
            lines.append(line if row.gradient_error is None else f"{line}  gradients {row.gradient_error:.2%}")
        return "\n".join(lines)


@check_types
def fp8_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    policy: FP8Policy | None = None,
    *,
    by: str = "weight",
    loss: Loss | None = None,
    gradients: bool = False,
) -> Sensitivity:
    """Puts one weight, or one layer, at a time into FP8, everything else in high precision, and measures the loss.

    The model comes back as it was: FP8 or not, modes, gradients and random state. It is measured in eval mode.

    Args:
        model: as for `fp8_training`.
        batches: token ids [B, T], or mappings of the model's arguments, labels among them.
        policy: default `V3_RECIPE`.
        by: "weight" or "layer" (everything below the same numbered module).
        loss: `loss(model, batch)`, a scalar. Default: the model's loss, and 0.3 times its `mtp_loss` if it has one.
        gradients: also compare the gradients of all parameters; twice their memory.

    Raises:
        ValueError: no batch, a loss that is not finite in high precision, or a policy that does not fit.
    """
    if by not in ("weight", "layer"):
        raise ValueError(f"expected by 'weight' or 'layer', got {by!r}")
    policy, loss = policy or V3_RECIPE, loss or default_loss
    rules = policy.assign(weights_of(model))
    precisions = {name: rule.precision for name, rule in rules.items() if rule and not rule.precision.is_high}
    groups = _groups(precisions, by)
    bases: list[float] = []
    changes: dict[str, list[float]] = {group: [] for group in groups}
    ratios: dict[str, list[float]] = {group: [] for group in groups}
    with _as_it_was(model):
        install(model, precisions)  # all at once first: a misfit is an error before the work
        for batch in batches:
            install(model, {})
            base, slopes = _measure(model, batch, loss, gradients)
            if not math.isfinite(base):
                raise ValueError(f"expected finite losses in high precision, got {base}")
            bases.append(base)
            for group, names in groups.items():
                install(model, {name: precisions[name] for name in names})
                value, in_fp8 = _measure(model, batch, loss, gradients)
                changes[group].append(value - base)
                ratios[group] += [_relative(slopes, in_fp8)] if gradients else []
    if not bases:
        raise ValueError("expected at least one batch, got none")
    rows = [_row(group, names, changes[group], ratios[group]) for group, names in groups.items()]
    rows.sort(key=lambda row: (not math.isnan(row.error), -row.error, row.name))
    return Sensitivity(tuple(rows), sum(bases) / len(bases), policy)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the model's loss on token ids or on a mapping of arguments, multi-token prediction included."""
    out = model(**batch) if isinstance(batch, Mapping) else model(input_ids=batch, labels=batch)
    if getattr(out, "loss", None) is None:
        raise ValueError("expected a model that returns a loss and batches with labels, or a loss function of your own")
    ahead = getattr(out, "mtp_loss", None)
    return out.loss if ahead is None else out.loss + MTP_WEIGHT * ahead


def _measure(model: nn.Module, batch: Any, loss: Loss, gradients: bool) -> tuple[float, list[Tensor | None]]:
    """Returns the loss, and the gradients of all parameters that have one, without touching `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad] if gradients else []
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # The same random numbers each time, should the loss draw any.
    with torch.random.fork_rng(devices=list(devices)), torch.set_grad_enabled(bool(parameters)):
        value = loss(model, batch)
        slopes = torch.autograd.grad(value, parameters, allow_unused=True) if parameters else ()
    return float(value.detach()), list(slopes)


def _row(group: str, names: tuple[str, ...], changes: list[float], ratios: list[float]) -> SensitivityRow:
    count = len(changes)
    gradient_error = sum(ratios) / count if ratios else None
    return SensitivityRow(group, names, sum(changes) / count, sum(map(abs, changes)) / count, gradient_error)


def _relative(old: list[Tensor | None], new: list[Tensor | None]) -> float:
    error = total = 0.0
    for a, b in zip(old, new, strict=True):
        if a is not None and b is not None:
            error += float((b.double() - a.double()).square().sum())
            total += float(a.double().square().sum())
    return math.sqrt(error / total) if total else math.sqrt(error)


def _groups(names: Iterable[str], by: str) -> dict[str, tuple[str, ...]]:
    """Groups weights by name, or by their name up to the last number in it that a dot follows."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"(.*\.)?\d+(?=\.)", name) if by == "layer" else None
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return {group: tuple(own) for group, own in groups.items()}


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    modes, precisions = {module: module.training for module in model.modules()}, assign(model)
    model.eval()
    try:
        yield
    finally:
        install(model, precisions)
        for module, mode in modes.items():
            module.training = mode


def _percent(error: float, base: float) -> str:
    return f"{error / abs(base):.3%}" if base else "-"
