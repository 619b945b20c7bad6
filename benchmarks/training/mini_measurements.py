"""A small model trained from nothing, and measured: `mini` with reports on the way.

The use of the experts, as a picture, and beside it a task on which experts collapse without balancing; how many drafted
tokens are accepted while the MTP module learns, on held-out text and on text that the model writes; and decoding with
and without drafts, interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.moe.expert_load import LoadHistory, draw_max_violation

from ..core.machine import load_average
from ..core.report import OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.timing import interleave
from .acceptance import GivenText, on_given_text
from .corpus import repository_text, spread_rows
from .mini import Recipe, default_device, mini_config, train
from .skewed import train_skewed

__all__ = ["Settings", "main", "run"]

PLAIN = "plain decoding"
NO_BALANCING = "no balancing"
PROMPT = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """A training run, and what is measured of it.

    Raises:
        ValueError: a size that is not positive.
    """

    evaluations: Annotated[int, "times that acceptance is measured, evenly spread"] = 4
    held_out_rows: Annotated[int, "pieces of held-out text on which drafts are compared"] = 16
    drafts: Annotated[int, "tokens drafted in a step, at most"] = 2
    prompts: Annotated[int, "held-out prompts to continue"] = 4
    new_tokens: Annotated[int, "tokens by which they are continued"] = 96
    skewed_steps: Annotated[int, "steps of the skewed task; 0 leaves it out"] = 100
    picture: Annotated[str, "PNG of the experts' use; '' for none"] = "benchmarks/results/train-mini-experts.png"
    skewed_picture: Annotated[str, "PNG of the skewed task; '' for none"] = "benchmarks/results/train-mini-skewed.png"
    checkpoint: Annotated[str, "folder for the model, in the published layout (default: none)"] = ""
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.evaluations, self.held_out_rows, self.drafts, self.prompts, self.new_tokens)
        if min(sizes) < 1 or self.skewed_steps < 0:
            raise ValueError(f"expected positive sizes, got {self}")


@dataclass(frozen=True)
class Texts:
    """Training text, held-out prompts [P, 64], and held-out rows for the drafts."""

    training: Tensor
    prompts: Tensor
    rows: Tensor

    @classmethod
    def split(cls, text: Tensor, settings: Settings) -> Texts:
        """Holds out the last twentieth of a text, or as much as the prompts need.

        Raises:
            ValueError: too little text is left for training.
        """
        held_out = max(settings.prompts * PROMPT, len(text) // 20)
        if len(text) - held_out <= settings.sequence + 1:
            raise ValueError(f"expected more than {held_out + settings.sequence + 1} bytes of text, got {len(text)}")
        end = text[len(text) - held_out :]
        rows = spread_rows(end, settings.held_out_rows, min(settings.sequence, held_out))
        return cls(text[: len(text) - held_out], spread_rows(end, settings.prompts, PROMPT), rows)


def run(
    settings: Settings | None = None,
    config: da.DeepseekConfig | None = None,
    text: Tensor | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Trains, measures acceptance on the way, then times decoding with and without drafts.

    Args:
        config: default `mini_config()`.
        text: token ids [N]; default the repository's files.

    Raises:
        ValueError: a text too short to hold back the prompts, or drafts whose greedy tokens differ from plain decoding.
    """
    settings, config = settings or Settings(), config or mini_config()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    text = repository_text() if text is None else text
    texts, device = Texts.split(text, settings), default_device()
    model = da.DeepseekLM(config, device=device, dtype=torch.float32)
    prompts, history = texts.prompts.to(device), LoadHistory()
    evaluations: list[tuple[int, da.SpeculationReport, GivenText]] = []
    marks = {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}

    def evaluate(step: int, loss: float) -> None:
        if step in marks:
            drafted = _draft(model, prompts, settings)
            evaluations.append((step, drafted, on_given_text(model, texts.rows.to(device))[0]))

    started = time.perf_counter()
    losses = train(model, texts.training, settings, history=history, on_step=evaluate)
    seconds = time.perf_counter() - started
    if settings.picture and _can_draw():
        Path(settings.picture).parent.mkdir(parents=True, exist_ok=True)
        history.heat_map(settings.picture, "Expert use while training")
    if settings.checkpoint:
        da.save(model.to(torch.bfloat16), settings.checkpoint)
        model.to(torch.float32)
    last = losses[-max(1, settings.steps // 10) :]
    rows = [
        Row("next-token loss, last tenth of the steps", "nats", "lower", {OURS: Samples(tuple(last))}),
        _balance_row(history),
        *(row for step, _, given in evaluations for row in _given_text_rows(step, given)),
        *(_acceptance_row(step, drafted) for step, drafted, _ in evaluations),
        *_skewed_rows(settings),
        *_decoding_rows(model, prompts, settings),
    ]
    for row in rows:
        on_row(row)
    parameters = da.count_parameters(config)
    facts = asdict(settings) | {"parameters": parameters.total + parameters.mtp, "training_seconds": round(seconds)}
    pieces, length = texts.rows.shape
    notes = (
        f"{len(text):,} bytes of text, the last {len(text) - len(texts.training):,} held out",
        f"held-out text: {pieces} pieces of {length} bytes, every byte before the guessed one given",
        "decoding: greedy, float32, the same tokens with and without drafts; draft lengths adapt",
        f"load average {load_average()} at the end",
    )
    return Report("train-mini", facts, tuple(rows), notes)


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _draft(model: da.DeepseekLM, prompts: Tensor, settings: Settings) -> da.SpeculationReport:
    """Continues the prompts with drafts of a fixed length."""
    _, report = da.generate(
        model,
        prompts,
        max_new_tokens=settings.new_tokens,
        mtp_depth=settings.drafts,
        adaptive=False,
        return_report=True,
    )
    return report


def _balance_row(history: LoadHistory) -> Row:
    """Max violation of each layer over the last tenth of the steps, all of them together."""
    steps = max(1, len(next(iter(history.shares.values()), ())) // 10)
    worst = tuple(float(load.max() - 1) for load in history.mean(steps).values())
    name, note = "max violation of expert loads, last tenth of the steps", "one sample for each layer"
    return Row(name, "of the mean load", "lower", {OURS: Samples(worst)}, note=note)


def _skewed_rows(settings: Settings) -> list[Row]:
    """The skewed task with and without balancing: max violation of each layer, and the picture."""
    if not settings.skewed_steps:
        return []
    rates = {OURS: 1e-2, NO_BALANCING: 0.0}
    histories = {name: train_skewed(rate, settings.skewed_steps)[0] for name, rate in rates.items()}
    if settings.skewed_picture and _can_draw():
        Path(settings.skewed_picture).parent.mkdir(parents=True, exist_ok=True)
        named = {"without balancing": histories[NO_BALANCING], "biases follow the load": histories[OURS]}
        draw_max_violation(named, settings.skewed_picture, "Expert loads of a skewed task")
    last = max(1, settings.skewed_steps * 2 // 5)
    worst = {
        name: Samples(tuple(float(load.max() - 1) for load in history.mean(last).values()))
        for name, history in histories.items()
    }
    name = f"max violation on a skewed task, last {last} of {settings.skewed_steps} steps"
    return [Row(name, "of the mean load", "lower", worst, NO_BALANCING, note="one sample for each layer")]


def _share(name: str, step: int, value: float, note: str) -> Row:
    return Row(f"{name}, after {step} steps", "share", "higher", {OURS: Samples((value,))}, note=note)


def _given_text_rows(step: int, given: GivenText) -> list[Row]:
    """Guesses of the first MTP depth on held-out text, after so many steps."""
    both = f"{given.both_right:.1%} of all positions are accepted and right"
    main_model = f"the main model, one step later: {given.main_right:.1%}"
    return [
        _share("held-out text, draft is the main model's guess", step, given.accepted, both),
        _share("held-out text, draft is right", step, given.right, main_model),
    ]


def _acceptance_row(step: int, report: da.SpeculationReport) -> Row:
    shares = ", ".join("-" if share is None else f"{share:.0%}" for share in report.acceptance)
    first = (report.acceptance[0] if report.acceptance else None) or 0.0
    note = f"by position: {shares}; {report.tokens_per_step:.2f} tokens a step"
    return _share("own text, first draft accepted", step, first, note)


def _decoding_rows(model: da.DeepseekLM, prompts: Tensor, settings: Settings) -> list[Row]:
    """Tokens per second with and without drafts, for one prompt and for all of them together."""
    rows = []
    for count in sorted({1, len(prompts)}):
        batch = prompts[:count]

        def decode(depth: int, batch: Tensor = batch) -> Tensor:
            return da.generate(model, batch, max_new_tokens=settings.new_tokens, mtp_depth=depth)

        if not torch.equal(decode(settings.drafts), decode(0)):
            raise ValueError("expected the tokens of plain decoding from drafts, got others")
        actions = {OURS: lambda f=decode: f(settings.drafts), PLAIN: lambda f=decode: f(0)}
        times = interleave(actions, rounds=5)
        speeds = {name: samples.map(lambda s, n=count: n * settings.new_tokens / s) for name, samples in times.items()}
        name = f"decoding {count} prompt{'s' if count > 1 else ''}"
        rows.append(Row(name, "tokens/s", "higher", speeds, baseline=PLAIN, goal=1.0))
    return rows


def main(settings: Settings) -> int:
    """Runs the command `train-mini`."""
    show_and_save(run(settings, on_row=print_progress), settings.out or RESULTS / "train-mini.json")
    return 0
