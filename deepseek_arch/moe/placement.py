"""Placement of experts on devices by their measured loads."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config.argument_types import check_types, shown

__all__ = ["ExpertPlacement", "plan_placement"]

_MOST = 100_000  # experts, copies and devices


@dataclass(frozen=True)
class ExpertPlacement:
    """Placement of experts on devices, some of them more than once.

    Attributes:
        devices: expert ids of each device.
        loads: of each device, the sum of its experts' loads; an expert's load is shared evenly by its copies.
        contiguous: loads without the plan: E / D consecutive experts for each device.
    """

    devices: tuple[tuple[int, ...], ...]
    loads: tuple[float, ...]
    contiguous: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """Largest load over the mean: the time of the slowest device, where 1 is perfect."""
        return _imbalance(self.loads)

    @property
    def imbalance_before(self) -> float:
        """Imbalance without the plan."""
        return _imbalance(self.contiguous)

    def __str__(self) -> str:
        lines = [f"imbalance (largest load / mean) {self.imbalance_before:.3f} before, {self.imbalance:.3f} after"]
        for number, (experts, load) in enumerate(zip(self.devices, self.loads, strict=True)):
            lines.append(f"device {number}: load {load:g}, experts {', '.join(map(str, experts))}")
        return "\n".join(lines)


def _imbalance(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


@check_types
def plan_placement(
    loads: Tensor | Iterable[float], devices: int, redundant: int = 0, nodes: int = 1
) -> ExpertPlacement:
    """Places experts, and copies of the busiest, so that devices have about the same work (V3 report, section 3.4.1).

    The busiest expert, by load per copy, gets the next of the `redundant` copies; then the copies are dealt out from
    the heaviest to the lightest, each to the device with the least work that has a place left and, as long as there is
    one, no copy of it yet.
    The greedy rule is within 4/3 of the best placement where places do not bind (Graham's bound).

    Args:
        loads: [E] of one layer, from an `ExpertLoad` or a `LoadHistory`.
        devices: D.
        redundant: copies beyond one of each; E + redundant must be a multiple of D.
        nodes: devices come in so many nodes, and E / nodes consecutive experts stay on each, as V3 has it: a token that
            is sent to few nodes is sent to as few after the plan. Experts, copies and devices must be multiples of it.

    Raises:
        ValueError: the numbers do not fit, or a load is negative or not finite.
    """
    work = _numbers(loads)
    if devices > _MOST or redundant > _MOST:
        raise ValueError(f"expected at most {_MOST} devices and copies, got {shown(devices)} and {shown(redundant)}")
    if nodes != 1:
        return _by_node(work, devices, redundant, nodes)
    total = len(work) + redundant
    if not work or min(work) < 0 or devices < 1 or redundant < 0 or total % devices:
        raise ValueError(
            "expected loads of at least 0 and devices that divide the number of experts and copies, got "
            f"{len(work)} experts, {redundant} copies, {devices} devices"
        )
    copies = [1] * len(work)
    for _ in range(redundant):
        fewer = [expert for expert in range(len(work)) if copies[expert] < devices]
        if not fewer:
            raise ValueError(f"expected at most {len(work) * (devices - 1)} copies, got {redundant}")
        copies[max(fewer, key=lambda expert: work[expert] / copies[expert])] += 1
    pieces = sorted(((work[e] / copies[e], e) for e in range(len(work)) for _ in range(copies[e])), reverse=True)
    assigned: list[list[int]] = [[] for _ in range(devices)]
    filled = [0.0] * devices
    heap = [(0.0, device) for device in range(devices)]
    for load, expert in pieces:
        passed = []
        while True:
            device = heapq.heappop(heap)[1]
            if expert not in assigned[device]:
                break
            passed.append((filled[device], device))
            if not heap:  # the last places left are on devices that have a copy already: a second one does no harm
                device = passed.pop()[1]
                break
        assigned[device].append(expert)
        filled[device] += load
        if len(assigned[device]) < total // devices:
            heapq.heappush(heap, (filled[device], device))
        for entry in passed:
            heapq.heappush(heap, entry)
    size = -(-len(work) // devices)
    contiguous = tuple(sum(work[start : start + size]) for start in range(0, size * devices, size))
    return ExpertPlacement(tuple(tuple(sorted(experts)) for experts in assigned), tuple(filled), contiguous)


def _numbers(loads: Tensor | Iterable[float]) -> list[float]:
    """Returns loads as Python's numbers, all finite."""
    try:
        listed = list(itertools.islice(loads, _MOST + 1))
        work = [float(load) for load in listed]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"expected loads to be a list of numbers, got {shown(loads)}") from None
    if not all(map(math.isfinite, work)) or len(work) > _MOST:
        raise ValueError(f"expected at most {_MOST} finite loads, got {shown(listed[:10])}")
    return work


def _by_node(work: list[float], devices: int, redundant: int, nodes: int) -> ExpertPlacement:
    """Places consecutive experts on each node, and joins the nodes' placements."""
    if nodes < 1 or len(work) % nodes or devices % nodes or redundant % nodes:
        raise ValueError(
            f"expected nodes that divide {len(work)} experts, {devices} devices and {redundant} copies, got {nodes}"
        )
    size = len(work) // nodes
    parts = [
        plan_placement(work[start : start + size], devices // nodes, redundant // nodes)
        for start in range(0, len(work), size)
    ]
    assigned = (tuple(e + node * size for e in experts) for node, part in enumerate(parts) for experts in part.devices)
    return ExpertPlacement(
        tuple(assigned), sum((part.loads for part in parts), ()), sum((part.contiguous for part in parts), ())
    )
