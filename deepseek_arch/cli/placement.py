"""Placement of experts on devices, layer by layer: `deepseek-arch place` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ..moe.expert_load import read_loads
from ..moe.placement import ExpertPlacement, plan_placement

__all__ = ["placements", "print_placements", "to_json"]


def placements(
    path: Path, devices: int, redundant: int, nodes: int, last: int | None, layers: Sequence[str]
) -> dict[str, ExpertPlacement]:
    """Returns a placement for each router of a file of loads, or for the named ones.

    Raises:
        ValueError: the file holds no loads, a name is none of its routers, or the numbers do not fit.
        OSError: the file cannot be read.
    """
    loads = read_loads(path, last)
    unknown = [name for name in layers if name not in loads]
    if unknown:
        raise ValueError(f"expected --layer to be some of {', '.join(loads)}, got {', '.join(unknown)}")
    return {name: plan_placement(loads[name], devices, redundant, nodes) for name in layers or loads}


def to_json(plans: dict[str, ExpertPlacement]) -> dict[str, Any]:
    """Returns everything as JSON can hold it."""
    return {
        name: {"imbalance_before": plan.imbalance_before, "imbalance": plan.imbalance, **asdict(plan)}
        for name, plan in plans.items()
    }


def print_placements(plans: dict[str, ExpertPlacement]) -> None:
    """Prints each layer's imbalance and experts by device, then the worst of all layers."""
    for name, plan in plans.items():
        typer.echo(f"{name}: {plan}\n")
    before, after = (
        max(values) for values in zip(*((p.imbalance_before, p.imbalance) for p in plans.values()), strict=True)
    )
    typer.echo(f"worst of {len(plans)} layers: {before:.3f} before, {after:.3f} after")
