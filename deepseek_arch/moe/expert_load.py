"""Loads of experts: reports of one step, and histories over many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.argument_types import check_types, shown
from ..config.regular_file import open_regular

__all__ = ["ExpertLoad", "LoadHistory", "draw_max_violation", "read_loads"]

_MOST = 1e30  # of a load that is read; float32 holds it, and sums of it


@check_types
@dataclass(frozen=True)
class ExpertLoad:
    """Load of the experts of each layer between two steps.

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

    @check_types
    def save(self, path: str | Path) -> None:
        """Writes the loads as JSON, for `read_loads` and `deepseek-arch place`."""
        _write(path, {"loads": {name: load.tolist() for name, load in self.loads.items()}, "rate": self.rate})

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

    @check_types
    def add(self, report: ExpertLoad) -> ExpertLoad:
        """Adds one step's report, and returns it."""
        for name, load in report.loads.items():
            share = (load.double() * len(load) / load.sum().clamp(min=1)).float().cpu()
            self.shares.setdefault(name, []).append(share)
        return report

    @check_types
    def max_violation(self, name: str) -> list[float]:
        """Returns the max violation of one router, step by step."""
        if name not in self.shares:
            raise ValueError(f"expected one of {', '.join(self.shares) or 'no router'}, got {shown(name)}")
        return [float(share.max() - 1) for share in self.shares[name]]

    @check_types
    def mean(self, last: int | None = None) -> dict[str, Tensor]:
        """Returns the mean share of each expert over the last steps (default all), float32 [E] by router; 1 is perfect.

        Raises:
            ValueError: `last` is not positive.
        """
        if last is not None and last < 1:
            raise ValueError(f"expected at least 1 step, got {last}")
        return {name: torch.stack(shares[-(last or 0) :]).mean(0) for name, shares in self.shares.items()}

    @check_types
    def save(self, path: str | Path) -> None:
        """Writes all steps as JSON, for `LoadHistory.load`, `read_loads` and `deepseek-arch place`."""
        shares = {name: [[round(float(v), 6) for v in step] for step in steps] for name, steps in self.shares.items()}
        _write(path, {"shares": shares})

    @classmethod
    @check_types
    def load(cls, path: str | Path) -> LoadHistory:
        """Reads a history that `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        saved = _read(path)
        if "shares" not in saved:
            raise ValueError(f"expected a saved LoadHistory in {str(path)!r}, got one step's loads")
        return cls({name: [torch.tensor(step) for step in steps] for name, steps in saved["shares"].items()})

    @check_types
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


def draw_max_violation(runs: Mapping[str, LoadHistory], path: str | Path, title: str = "") -> Path:
    """Draws max violation over steps, a line for each run: the worst router, and a band down to the best -> the PNG.

    Args:
        runs: by what the legend calls them, such as {"without balancing": history, "with": another}.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'deepseek-arch[plot]'`).
        ValueError: there is nothing to draw.
    """
    if not runs or not all(history.shares for history in runs.values()):
        raise ValueError("expected runs of at least one step, got none or an empty one")
    figures, _ = _matplotlib()
    figure = figures.Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    for label, history in runs.items():
        curves = torch.tensor([history.max_violation(name) for name in history.shares])  # [routers, steps]
        worst, best = curves.amax(0).numpy(), curves.amin(0).numpy()
        (line,) = panel.plot(worst, label=label)
        panel.fill_between(range(len(worst)), best, worst, color=line.get_color(), alpha=0.2, linewidth=0)
    panel.set_xlabel("step")
    panel.set_ylabel("max violation (largest load / mean - 1)")
    panel.set_ylim(bottom=0)
    panel.legend()
    panel.set_title(title or "Expert loads: the worst layer, and the range over layers")
    figure.savefig(path, dpi=150, format="png")
    return Path(path)


def read_loads(path: str | Path, last: int | None = None) -> dict[str, Tensor]:
    """Reads loads by router name, float32 [E], from a file that `ExpertLoad` or `LoadHistory` saved.

    Args:
        last: of a history, the number of last steps to average over; default all.

    Raises:
        ValueError: the file is something else, or `last` is not positive.
        OSError: it cannot be read.
    """
    saved = _read(path)
    if "shares" in saved:
        return LoadHistory.load(path).mean(last)
    return {name: torch.tensor(load, dtype=torch.float32) for name, load in saved["loads"].items()}


def _write(path: str | Path, value: Mapping[str, object]) -> None:
    Path(path).write_text(json.dumps(value) + "\n", encoding="utf-8")


def _read(path: str | Path) -> dict[str, Any]:
    """Reads and checks saved loads: {"loads": {router: [E numbers]}} or {"shares": {router: [steps of E numbers]}}."""
    wrong = f"expected loads that ExpertLoad.save or LoadHistory.save wrote in {str(path)!r}, got "
    try:
        with open_regular(path) as stream:
            saved = json.loads(stream.readall().decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(wrong + "no JSON") from None
    kinds = [kind for kind in ("loads", "shares") if isinstance(saved, dict) and isinstance(saved.get(kind), dict)]
    if not kinds or not saved[kinds[0]]:
        raise ValueError(wrong + "neither loads nor shares of any router")
    for name, values in saved[kinds[0]].items():
        steps = values if kinds[0] == "shares" else [values]
        if not isinstance(steps, list) or not steps or not all(map(_is_load, steps)) or len(set(map(len, steps))) > 1:
            raise ValueError(wrong + f"something else than numbers of at least 0 for {name!r}")
    return saved


def _is_load(values: object) -> bool:
    def is_number(v: object) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= _MOST

    return isinstance(values, list) and bool(values) and all(map(is_number, values))


def _matplotlib():
    """Imports matplotlib's figure and colors: without pyplot, no global state changes and no window opens."""
    try:
        from matplotlib import colors, figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'deepseek-arch[plot]'") from error
    return figure, colors
