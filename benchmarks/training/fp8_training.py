"""A small model trained in bfloat16 and in FP8, from the same weights on the same batches: what FP8 does to the loss.

V3's report has less than 0.25 % for its two models. Both runs multiply in bfloat16 under autocast, but for what the
recipe puts into FP8, over float32 master weights. A third run, in bfloat16 again but with the batches drawn in another
order, shows how much the loss differs for no reason at all. The text is this repository's own, as bytes.

    python -m benchmarks.training.fp8_training --steps 300
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.quant.fp8_training import V3_RECIPE, FP8Policy, fp8_training

from ..core.report import OURS, Report, Row, Samples, load_average
from ..core.tables import show

__all__ = ["Settings", "corpus", "run", "small_config"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks") / "results"  # of the repository root
TEXTS = ("deepseek_arch/**/*.py", "kernels/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "*.md")
BF16, OTHER = "bf16", "bf16, other order"
PAPER = 0.25  # percent
MTP_WEIGHT = 0.3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to train and on how much.

    Attributes:
        steps: optimizer steps of each run.
        last: how many of the last steps the training loss is averaged over.
        rate, warmup: the learning rate rises to `rate` over so many steps and falls to a tenth of it along a cosine, so
            that the loss at the end does not hang on the last few batches.
        held_out: batches at the end of the corpus that are not trained on but measured at the end.
        seed: of the initial weights; the order of batches has the same, the third run's the next.
    """

    steps: int = 300
    last: int = 50
    batch: int = 8
    sequence: int = 128
    rate: float = 2e-3
    warmup: int = 20
    held_out: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.steps, self.last, self.batch, self.sequence, self.warmup, self.held_out)
        if min(sizes) < 1 or self.last > self.steps:
            raise ValueError(f"expected positive sizes and last <= steps, got {self}")

    def schedule(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        fall = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / self.warmup) * fall


def small_config() -> da.DeepseekConfig:
    """All of `mini` but its size (2.8 million parameters): experts, shared experts, multi-token prediction.

    Every width is 128 or more, so that most groups and blocks are whole.
    """
    return da.DeepseekConfig.from_pretrained("mini").replace(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        q_lora_rank=128,
        kv_lora_rank=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dtype="float32",
    )


def corpus() -> Tensor:
    """The repository's texts, one after another, as token ids uint8 [N]."""
    paths = sorted({path for pattern in TEXTS for path in ROOT.glob(pattern)})
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def run(
    settings: Settings | None = None,
    config: da.DeepseekConfig | None = None,
    policy: FP8Policy = V3_RECIPE,
    text: Tensor | None = None,
) -> Report:
    """Trains three times.

    Args:
        config: default `small_config()`.
        text: token ids [N]; default `corpus()`.

    Raises:
        ValueError: a text too short to hold back the batches to measure.
    """
    settings, config = settings or Settings(), config or small_config()
    text = corpus() if text is None else text
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cut = len(text) - settings.held_out * settings.batch * (settings.sequence + 1)
    if cut <= settings.sequence:
        raise ValueError(f"expected more than {len(text) - cut + settings.sequence} bytes of text, got {len(text)}")
    held_out = text[cut:].view(settings.held_out, settings.batch, -1).long().to(device)
    curves: dict[str, list[float]] = {}
    ends: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    weights = 0
    for name, order in ((OURS, settings.seed), (BF16, settings.seed), (OTHER, settings.seed + 1)):
        torch.manual_seed(settings.seed)
        model = da.DeepseekLM(config, device=device, dtype=torch.float32)
        if name == OURS:
            weights = len(fp8_training(model, policy).fp8)
        start = time.perf_counter()
        curves[name] = _train(model, text[:cut], settings, order)
        seconds[name] = time.perf_counter() - start
        ends[name] = _evaluate(model, held_out)
    return _report(settings, config, text, curves, ends, seconds, weights)


def _train(model: da.DeepseekLM, text: Tensor, settings: Settings, order: int) -> list[float]:
    """The cross-entropy of every step."""
    generator = torch.Generator().manual_seed(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.schedule)
    losses = []
    model.train()
    for _ in range(settings.steps):
        starts = torch.randint(len(text) - settings.sequence, (settings.batch,), generator=generator)
        rows = torch.stack([text[s : s + settings.sequence + 1] for s in starts.tolist()]).long().to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            out = model(rows, labels=rows)
        loss = out.loss if out.mtp_loss is None else out.loss + MTP_WEIGHT * out.mtp_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        balance = 0.0 if out.aux_loss is None else float(out.aux_loss.detach())  # in training part of the loss
        losses.append(float(out.loss.detach()) - balance)
    return losses


@torch.no_grad()
def _evaluate(model: da.DeepseekLM, held_out: Tensor) -> list[float]:
    """The cross-entropy of every held out batch, in the precision that the model was trained in."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        return [float(model(rows, labels=rows).loss) for rows in held_out]


def _report(
    settings: Settings,
    config: da.DeepseekConfig,
    text: Tensor,
    curves: dict[str, list[float]],
    ends: dict[str, list[float]],
    seconds: dict[str, float],
    weights: int,
) -> Report:
    parameters = da.count_parameters(config)
    facts = asdict(settings) | {
        "parameters": parameters.total + parameters.mtp,
        "fp8_weights": weights,
        "text_bytes": len(text),
        "text_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
    }
    last = {name: curve[-settings.last :] for name, curve in curves.items()}
    rows = [
        _row("training loss, every step", "nats", curves, note="the whole curves are in the file"),
        _row(f"training loss, last {settings.last} steps", "nats", last),
        _row("held-out loss", "nats", ends, note=f"{settings.held_out} batches after the last step"),
        _difference("training loss, difference to bf16", last, "the other order has other batches in these steps"),
        _difference("held-out loss, difference to bf16", ends, "bf16 in another order: the noise"),
        _row("time of a step", "s", {name: [total / settings.steps] for name, total in seconds.items()}),
    ]
    notes = (f"the paper: below {PAPER} %", f"load average {load_average()} at the end")
    return Report("fp8-training", facts, tuple(rows), notes)


def _row(name: str, unit: str, values: dict[str, list[float]], note: str = "") -> Row:
    return Row(name, unit, "lower", {who: Samples(tuple(v)) for who, v in values.items()}, note=note)


def _difference(name: str, values: dict[str, list[float]], note: str) -> Row:
    """The mean losses' distance from bfloat16's, in percent of it."""
    means = {who: sum(v) / len(v) for who, v in values.items()}
    percent = {who: (100 * abs(mean / means[BF16] - 1),) for who, mean in means.items() if who != BF16}
    return Row(name, "%", "lower", {who: Samples(p) for who, p in percent.items()}, goal=PAPER, note=note)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a small model in FP8 and in bfloat16 and compares the losses.")
    for name in ("steps", "last", "batch", "sequence", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "fp8-training.json", help="report file")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    path = options.pop("out")
    report = run(Settings(**options))
    show(report)
    report.save(path)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
