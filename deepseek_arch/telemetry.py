"""How evenly experts are used: reports of one step, histories over many, and where to put experts by them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LoadHistory", "LoadReport", "Placement", "plan_placement"]


@dataclass(frozen=True)
class LoadReport:
    """How evenly the experts of each layer were used between two steps.

    Attributes:
        loads: by router name, int64 [E], tokens that chose each expert.
        rate: the update rate that was applied.
    """

    loads: dict[str, Tensor]
    rate: float = 0.0

    @property
    def max_violation(self) -> dict[str, float]:
        """By router, the largest load over the mean, minus one (arXiv 2408.15664, equation 4); 0 is perfect."""
        return {name: float(load.max() * len(load) / load.sum().clamp(min=1) - 1) for name, load in self.loads.items()}

    @property
    def entropy(self) -> dict[str, float]:
        """By router, the entropy of the loads over that of equal ones: 1 is perfect, 0 is one expert for all."""
        out = {}
        for name, load in self.loads.items():
            share = load.double() / load.sum().clamp(min=1)
            nats = -(share * share.clamp(min=1e-300).log()).sum()
            out[name] = float(nats / torch.tensor(float(max(len(load), 2))).log())
        return out

    def __str__(self) -> str:
        width = max(map(len, self.loads), default=0)
        violation, entropy = self.max_violation, self.entropy
        return "\n".join(
            f"{name:{width}}  max violation {violation[name]:6.3f}  entropy {entropy[name]:.4f}" for name in self.loads
        )


@dataclass
class LoadHistory:
    """Loads over steps: `history.add(balancer.step())`.

    Attributes:
        shares: by router name, float32 [E] of each step: the share of choices times E, so that 1 is perfect.
    """

    shares: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, report: LoadReport) -> LoadReport:
        """Takes in one step's report, and gives it back."""
        for name, load in report.loads.items():
            share = (load.double() * len(load) / load.sum().clamp(min=1)).float().cpu()
            self.shares.setdefault(name, []).append(share)
        return report

    def max_violation(self, name: str) -> list[float]:
        """Step by step, of one router."""
        return [float(share.max() - 1) for share in self.shares[name]]

    def heat_map(self, path: str | Path, title: str = "") -> Path:
        """Draws expert use over steps, one panel for each router, white where an expert has its share -> the PNG.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'deepseek-arch[plot]'`).
            ValueError: there is nothing to draw.
        """
        if not self.shares:
            raise ValueError("expected a history with at least one step, got an empty one")
        figures, colors = _matplotlib()
        figure = figures.Figure(figsize=(8, 1 + 1.6 * len(self.shares)), layout="constrained")
        panels = figure.subplots(len(self.shares), 1, squeeze=False, sharex=True)[:, 0]
        # From nothing to four times the share, the share itself in the middle.
        norm = colors.TwoSlopeNorm(1.0, vmin=0.0, vmax=4.0)
        for panel, (name, shares) in zip(panels, self.shares.items(), strict=True):
            grid = torch.stack(shares, 1).numpy()  # [E, steps]
            image = panel.imshow(grid, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
            panel.set_ylabel(f"{name or 'router'}\nexpert", fontsize=7)
        panels[-1].set_xlabel("step")
        figure.colorbar(image, ax=list(panels), label="tokens / mean tokens of an expert", extend="max")
        figure.suptitle(title or "Expert use")
        figure.savefig(path, dpi=150, format="png")
        return Path(path)


def _matplotlib():
    """Its figure and colors modules; the figure alone, without pyplot, changes no global state and opens no window."""
    try:
        from matplotlib import colors, figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'deepseek-arch[plot]'") from error
    return figure, colors


# ---------------------------------------------------------------- placement


@dataclass(frozen=True)
class Placement:
    """Which experts each device holds, some of them more than once.

    Attributes:
        devices: expert ids of each device.
        loads: of each device, its experts' loads; an expert's load is shared evenly by its copies.
        contiguous: loads without the plan: E / D consecutive experts for each device.
    """

    devices: tuple[tuple[int, ...], ...]
    loads: tuple[float, ...]
    contiguous: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """The largest load over the mean: the time of the slowest device, where 1 is perfect."""
        return _imbalance(self.loads)

    @property
    def imbalance_before(self) -> float:
        """The same without the plan."""
        return _imbalance(self.contiguous)

    def __str__(self) -> str:
        lines = [f"imbalance (largest load / mean) {self.imbalance_before:.3f} before, {self.imbalance:.3f} after"]
        for number, (experts, load) in enumerate(zip(self.devices, self.loads, strict=True)):
            lines.append(f"device {number}: load {load:g}, experts {', '.join(map(str, experts))}")
        return "\n".join(lines)


def _imbalance(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


def plan_placement(loads: Tensor | Sequence[float], devices: int, redundant: int = 0) -> Placement:
    """Places experts, and copies of the busiest, so that devices have about the same work (V3 report, section 3.4.1).

    The busiest expert, by load per copy, gets the next of the `redundant` copies; then the copies are dealt out from
    the heaviest to the lightest, each to the device with the least work that has a place left and, as long as there is
    one, no copy of it yet.
    The greedy rule is within 4/3 of the best placement where places do not bind (Graham's bound).

    Args:
        loads: [E] of one layer, from a `LoadReport` or a `LoadHistory`.
        devices: D.
        redundant: copies beyond one of each; E + redundant must be a multiple of D.

    Raises:
        ValueError: the numbers do not fit, or a load is negative.
    """
    work = [float(load) for load in loads]
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
    held: list[list[int]] = [[] for _ in range(devices)]
    filled = [0.0] * devices
    heap = [(0.0, device) for device in range(devices)]
    for load, expert in pieces:
        passed = []
        while True:
            device = heapq.heappop(heap)[1]
            if expert not in held[device]:
                break
            passed.append((filled[device], device))
            if not heap:  # the last places left are on devices that have a copy already: a second one does no harm
                device = passed.pop()[1]
                break
        held[device].append(expert)
        filled[device] += load
        if len(held[device]) < total // devices:
            heapq.heappush(heap, (filled[device], device))
        for entry in passed:
            heapq.heappush(heap, entry)
    size = -(-len(work) // devices)
    contiguous = tuple(sum(work[start : start + size]) for start in range(0, size * devices, size))
    return Placement(tuple(tuple(sorted(experts)) for experts in held), tuple(filled), contiguous)
