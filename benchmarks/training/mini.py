"""A small DeepSeek model trained from nothing, in minutes: an example to start from.

What it shows, in order: a model from a config; the training loop with multi-token prediction and with experts balanced
by biases (no auxiliary loss beyond V3's tiny one); what that does to expert use, as a picture, and beside it a task on
which experts collapse without; how many drafted tokens are accepted while the prediction layer learns, on given
held-out text and on what the model writes; and decoding with and without drafts, side by side. The text is this
repository's own, as bytes.

    python -m benchmarks train-mini --steps 400
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.models.mtp_loss import mtp_weight
from deepseek_arch.moe.expert_load import LoadHistory, draw_max_violation
from deepseek_arch.moe.load_balancer import LoadBalancer

from ..core.report import OURS, Report, Row, Samples, interleave, load_average
from .acceptance import GivenText, held_out_rows, on_given_text
from .fp8_training import corpus
from .skewed import train_skewed

__all__ = ["Settings", "mini_config", "run", "train"]

PLAIN = "plain decoding"
NO_BALANCING = "no balancing"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to train, on how much, and what to look at.

    Attributes:
        steps: optimizer steps.
        accumulate: batches of each step.
        evaluations: how many times acceptance is measured, evenly spread.
        held_out_rows: pieces of held-out text on which drafts are compared with the trunk's guesses.
        drafts: tokens drafted in a step, at most.
        prompts, new_tokens: held-out prompts to continue, and by how much.
        balance: rate of the bias updates; 0 leaves the experts to themselves.
        skewed_steps: steps of the skewed task, with and without balancing; 0 leaves it out.
        picture: where the heat map goes; empty for none.
        skewed_picture: where the skewed task's loads go; empty for nowhere.
        checkpoint: where the model goes, in the published layout; empty for nowhere.
    """

    steps: int = 400
    batch: int = 8
    sequence: int = 128
    accumulate: int = 1
    rate: float = 2e-3
    warmup: int = 20
    evaluations: int = 4
    held_out_rows: int = 16
    drafts: int = 2
    prompts: int = 4
    new_tokens: int = 96
    balance: float = 1e-3
    skewed_steps: int = 100
    seed: int = 0
    threads: int = 2
    picture: str = "benchmarks/results/train-mini-experts.png"
    skewed_picture: str = "benchmarks/results/train-mini-skewed.png"
    checkpoint: str = ""

    def __post_init__(self) -> None:
        sizes = (self.steps, self.batch, self.sequence, self.accumulate, self.warmup, self.evaluations, self.drafts)
        if min(*sizes, self.prompts, self.new_tokens, self.threads, self.held_out_rows) < 1 or self.skewed_steps < 0:
            raise ValueError(f"expected positive sizes, got {self}")


def mini_config() -> da.DeepseekConfig:
    """`mini`, smaller and on bytes: 8 layers, so that the one prediction layer is a small part of the work."""
    return da.DeepseekConfig.from_pretrained("mini").replace(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        moe_intermediate_size=128,
        num_hidden_layers=8,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        q_lora_rank=None,
        kv_lora_rank=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dtype="float32",
        bos_token_id=None,
        eos_token_id=None,
    )


def train(
    model: da.DeepseekLM,
    text: Tensor,
    settings: Settings,
    history: LoadHistory,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """The training loop -> the next-token loss of every step.

    Args:
        text: token ids [N].
        history: takes in how the experts were used.
        on_step: called after each step with how many were done.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / settings.warmup) * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps)),
    )
    balancer = LoadBalancer(model, rate=settings.balance)
    losses, seen = [], 0
    for step in range(settings.steps):
        model.train()
        total = 0.0
        for _ in range(settings.accumulate):
            starts = torch.randint(len(text) - settings.sequence, (settings.batch,), generator=draw).tolist()
            rows = torch.stack([text[s : s + settings.sequence + 1] for s in starts]).long().to(model.device)
            out = model(rows, labels=rows)  # out.loss contains out.aux_loss
            loss = out.loss + mtp_weight(seen) * out.mtp_loss
            (loss / settings.accumulate).backward()
            seen += rows.numel()
            total += float((out.loss - out.aux_loss).detach()) / settings.accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.add(balancer.step())  # once per optimizer step, whatever the accumulation
        losses.append(total)
        on_step(step + 1)
    return losses


def run(
    settings: Settings | None = None,
    config: da.DeepseekConfig | None = None,
    text: Tensor | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Trains, measures acceptance on the way, then times decoding with and without drafts.

    Raises:
        ValueError: a text too short to hold back the prompts, or drafts whose greedy tokens are not plain decoding's.
    """
    settings, config = settings or Settings(), config or mini_config()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    text = corpus() if text is None else text
    length = 64
    held_out = max(settings.prompts * length, len(text) // 20)
    if len(text) - held_out <= settings.sequence + 1:
        raise ValueError(f"expected more than {held_out + settings.sequence + 1} bytes of text, got {len(text)}")
    cut = len(text) - held_out
    places = torch.linspace(cut, len(text) - length, settings.prompts).long().tolist()
    prompts = torch.stack([text[p : p + length] for p in places]).long()
    given = held_out_rows(text[cut:], settings.held_out_rows, min(settings.sequence, held_out))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = da.DeepseekLM(config, device=device, dtype=torch.float32)
    history, looks = LoadHistory(), []
    marks = {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}

    def look(step: int) -> None:
        if step in marks:
            _, report = da.generate(
                model, prompts.to(device), max_new_tokens=settings.new_tokens, mtp_depth=settings.drafts,
                adaptive=False, return_report=True,
            )  # fmt: skip
            looks.append((step, report, on_given_text(model, given.to(device))[0]))

    started = time.perf_counter()
    losses = train(model, text[:cut], settings, history, look)
    seconds = time.perf_counter() - started
    if settings.picture and _can_draw():
        Path(settings.picture).parent.mkdir(parents=True, exist_ok=True)
        history.heat_map(settings.picture, "Expert use while training")
    if settings.checkpoint:
        da.save(model.to(torch.bfloat16), settings.checkpoint)
        model.to(torch.float32)
    end = losses[-max(1, settings.steps // 10) :]
    rows = [
        Row("next-token loss, last tenth of the steps", "nats", "lower", {OURS: Samples(tuple(end))}),
        *_balance_rows(history),
        *(row for step, _, found in looks for row in _given_text_rows(step, found)),
        *(_acceptance_row(step, report) for step, report, _ in looks),
        *_skewed_rows(settings),
    ]
    rows += _decoding_rows(model, prompts.to(device), settings)
    for row in rows:
        on_row(row)
    parameters = da.count_parameters(config)
    facts = asdict(settings) | {"parameters": parameters.total + parameters.mtp, "training_seconds": round(seconds)}
    notes = (
        f"{len(text):,} bytes of the repository's own text, the last {held_out:,} held out",
        f"held-out text: {len(given)} pieces of {given.shape[1]} bytes, every byte before the guessed one given",
        "decoding: greedy, float32, the same tokens with and without drafts; draft lengths adapt",
        f"load average {load_average()} at the end",
    )
    return Report("train-mini", facts, tuple(rows), notes)


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _balance_rows(history: LoadHistory) -> list[Row]:
    """Max violation of each layer over the last tenth of the steps, all of them together."""
    worst = []
    for shares in history.shares.values():
        last = torch.stack(shares[-max(1, len(shares) // 10) :]).mean(0)
        worst.append(float(last.max() - 1))
    return [
        Row(
            "max violation of expert loads, last tenth of the steps",
            "of the mean load",
            "lower",
            {OURS: Samples(tuple(worst))},
            note="one sample for each layer",
        )
    ]


def _skewed_rows(settings: Settings) -> list[Row]:
    """The skewed task with and without balancing: max violation of each layer, and the picture."""
    if not settings.skewed_steps:
        return []
    runs = {
        OURS: train_skewed(1e-2, settings.skewed_steps)[0],
        NO_BALANCING: train_skewed(0.0, settings.skewed_steps)[0],
    }
    if settings.skewed_picture and _can_draw():
        Path(settings.skewed_picture).parent.mkdir(parents=True, exist_ok=True)
        named = {"without balancing": runs[NO_BALANCING], "biases follow the load": runs[OURS]}
        draw_max_violation(named, settings.skewed_picture, "Expert loads of a skewed task")
    last = max(1, settings.skewed_steps * 2 // 5)
    worst = {
        who: Samples(tuple(float(load.max() - 1) for load in history.mean(last).values()))
        for who, history in runs.items()
    }
    return [
        Row(
            f"max violation on a skewed task, last {last} of {settings.skewed_steps} steps",
            "of the mean load",
            "lower",
            worst,
            baseline=NO_BALANCING,
            note="one sample for each layer",
        )
    ]


def _given_text_rows(step: int, found: GivenText) -> list[Row]:
    """What the first prediction depth guesses on held-out text, after so many steps."""
    return [
        Row(
            f"held-out text, draft is the trunk's guess, after {step} steps",
            "share",
            "higher",
            {OURS: Samples((found.accepted,))},
            note=f"{found.both_right:.1%} of all positions are kept and right",
        ),
        Row(
            f"held-out text, draft is right, after {step} steps",
            "share",
            "higher",
            {OURS: Samples((found.right,))},
            note=f"the trunk, one step later: {found.trunk_right:.1%}",
        ),
    ]


def _acceptance_row(step: int, report: da.SpeculationReport) -> Row:
    shares = ", ".join("-" if share is None else f"{share:.0%}" for share in report.acceptance)
    first = report.acceptance[0] if report.acceptance else None
    return Row(
        f"own text, first draft accepted, after {step} steps",
        "share",
        "higher",
        {OURS: Samples((first or 0.0,))},
        note=f"by position: {shares}; {report.tokens_per_step:.2f} tokens a step",
    )


def _decoding_rows(model: da.DeepseekLM, prompts: Tensor, settings: Settings) -> list[Row]:
    """Tokens a second of both ways of decoding, for one prompt and for all of them together."""
    rows = []
    for count in sorted({1, len(prompts)}):
        some = prompts[:count]

        def decode(depth: int, some: Tensor = some) -> Tensor:
            return da.generate(model, some, max_new_tokens=settings.new_tokens, mtp_depth=depth)

        if not torch.equal(decode(settings.drafts), decode(0)):
            raise ValueError("expected the tokens of plain decoding from drafts, got others")
        actions = {OURS: lambda f=decode: f(settings.drafts), PLAIN: lambda f=decode: f(0)}
        times = interleave(actions, rounds=5)
        speeds = {who: samples.map(lambda s, n=count: n * settings.new_tokens / s) for who, samples in times.items()}
        name = f"decoding {count} prompt{'s' if count > 1 else ''}"
        rows.append(Row(name, "tokens/s", "higher", speeds, baseline=PLAIN, goal=1.0))
    return rows
