"""A small model trained in FP8 and in bfloat16, from the same weights on the same batches: the effect on the loss.

The V3 report (arXiv 2412.19437, appendix B.1) has a relative error below 0.25 % for its two models. Both runs multiply
in bfloat16 under autocast over float32 master weights, except for the products that the recipe puts into FP8. A third
run in bfloat16 with the batches in another order shows how much the loss differs by chance. The text is this
repository's, as bytes.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.quant.fp8_training import V3_RECIPE, FP8Policy, fp8_training

from ..core.machine import load_average
from ..core.report import OURS, RESULTS, Report, Row, Samples
from ..core.tables import show_and_save
from .corpus import repository_text
from .mini import Recipe, default_device, mini_config, train

__all__ = ["BF16", "OTHER", "Settings", "main", "run", "small_config"]

BF16, OTHER = "bf16", "bf16, other order"
PAPER = 0.25  # percent


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """Three training runs, the third one with another order of batches, and what is measured at their end.

    Raises:
        ValueError: a size that is not positive, or fewer steps than are averaged.
    """

    steps: Annotated[int, "optimizer steps of each run"] = 300
    last: Annotated[int, "last steps over which the training loss is averaged"] = 50
    balance: Annotated[float, "rate of the bias updates that balance experts; 0 for none"] = 0.0
    held_out: Annotated[int, "batches at the end of the text that are measured and not trained on"] = 16
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.last, self.held_out) < 1 or self.last > self.steps:
            raise ValueError(f"expected positive sizes and last <= steps, got {self}")


def small_config() -> da.DeepseekConfig:
    """Returns `mini_config()` with 2 layers of 8 experts (2.8 million parameters).

    Every width is 128 or more, so that most groups and blocks of FP8 are whole.
    """
    return mini_config().replace(
        num_hidden_layers=2, intermediate_size=384, n_routed_experts=8, q_lora_rank=128, kv_lora_rank=128
    )


@dataclass
class Trained:
    """Results of one run: the loss of every step and of every held-out batch, and its time."""

    curve: list[float]
    held_out: list[float]
    seconds: float


def run(
    settings: Settings | None = None,
    config: da.DeepseekConfig | None = None,
    policy: FP8Policy = V3_RECIPE,
    text: Tensor | None = None,
) -> Report:
    """Trains three times.

    Args:
        config: default `small_config()`.
        text: token ids [N]; default the repository's files.

    Raises:
        ValueError: a text too short to hold back the batches to measure.
    """
    settings, config = settings or Settings(), config or small_config()
    text = repository_text() if text is None else text
    device = default_device()
    cut = len(text) - settings.held_out * settings.batch * (settings.sequence + 1)
    if cut <= settings.sequence:
        raise ValueError(f"expected more than {len(text) - cut + settings.sequence} bytes of text, got {len(text)}")
    held_out = text[cut:].view(settings.held_out, settings.batch, -1).long().to(device)
    runs: dict[str, Trained] = {}
    weights = 0
    for name in (OURS, BF16, OTHER):
        torch.manual_seed(settings.seed)
        model = da.DeepseekLM(config, device=device, dtype=torch.float32)
        if name == OURS:
            weights = len(fp8_training(model, policy).fp8)
        recipe = replace(settings, seed=settings.seed + 1) if name == OTHER else settings
        start = time.perf_counter()
        curve = train(model, text[:cut], recipe, autocast=torch.bfloat16)
        seconds = time.perf_counter() - start
        runs[name] = Trained(curve, _evaluate(model, held_out), seconds)
    parameters = da.count_parameters(config)
    facts = asdict(settings) | {
        "parameters": parameters.total + parameters.mtp,
        "fp8_weights": weights,
        "text_bytes": len(text),
        "text_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
    }
    notes = (f"the paper: below {PAPER} %", f"load average {load_average()} at the end")
    return Report("fp8-training", facts, tuple(_rows(runs, settings)), notes)


@torch.no_grad()
def _evaluate(model: da.DeepseekLM, held_out: Tensor) -> list[float]:
    """The cross-entropy of every held-out batch, in the precision in which the model was trained."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        return [float(model(rows, labels=rows).loss) for rows in held_out]


def _rows(runs: dict[str, Trained], settings: Settings) -> list[Row]:
    curves = {name: run.curve for name, run in runs.items()}
    last = {name: run.curve[-settings.last :] for name, run in runs.items()}
    ends = {name: run.held_out for name, run in runs.items()}
    seconds = {name: [run.seconds / settings.steps] for name, run in runs.items()}
    return [
        _row("training loss, every step", "nats", curves, note="the whole curves are in the file"),
        _row(f"training loss, last {settings.last} steps", "nats", last),
        _row("held-out loss", "nats", ends, note=f"{settings.held_out} batches after the last step"),
        _difference("training loss, difference to bf16", last, "the other order has other batches in these steps"),
        _difference("held-out loss, difference to bf16", ends, "bf16 in another order: the noise"),
        _row("time of a step", "s", seconds),
    ]


def _row(name: str, unit: str, values: dict[str, list[float]], note: str = "") -> Row:
    return Row(name, unit, "lower", {run: Samples(tuple(v)) for run, v in values.items()}, note=note)


def _difference(name: str, values: dict[str, list[float]], note: str) -> Row:
    """The differences of the mean losses to bfloat16's, in percent of it."""
    means = {run: sum(v) / len(v) for run, v in values.items()}
    percent = {run: (100 * abs(mean / means[BF16] - 1),) for run, mean in means.items() if run != BF16}
    return Row(name, "%", "lower", {run: Samples(p) for run, p in percent.items()}, goal=PAPER, note=note)


def main(settings: Settings) -> int:
    """Runs the command `fp8-training`."""
    torch.set_num_threads(settings.threads)
    show_and_save(run(settings), settings.out or RESULTS / "fp8-training.json")
    return 0
