"""The whole model against transformers' native one: decode, prefill, a training step, loading a checkpoint.

Same tensors, same threads, one process, interleaved; memory in processes of its own. Numbers come only after the
logits of both agree.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import deepseek_arch as da

from ..core.isolated import run_isolated
from ..core.report import NATIVE, OURS, Report, Row, Samples, interleave, load_average
from .contestants import (
    DTYPES,
    Action,
    check_same_logits,
    comparable,
    decode_actions,
    native_twin,
    prefill_actions,
    random_model,
    training_step,
)
from .deepseek_inference import CHECKED, DeepseekInference
from .deepseek_inference import NAME as DEEPSEEK
from .hot_spots import hot_spots

__all__ = ["PARTS", "Settings", "run"]

READ = "plain read"
GIGA = 1e9
MOST_STEPS = 22  # that a decode takes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how long to take.

    Attributes:
        contexts: cached tokens at which decoding is timed.
        prompts: prompt lengths at which prefill is timed.
        sequence: tokens of the training step.
        loads: times that each contestant loads the checkpoint.
        budget_s: seconds after which a contestant of one row is not run again.
        limit_s: seconds that a single run of transformers may take; longer ones are left out, and the row says so. For
            DeepSeek's code, in its own process, it is the limit of all runs of a row.
        deepseek_inference: folder of DeepSeek's inference code, to decode and prefill with it as well.
    """

    preset: str = "deepseek-v2-lite"
    layers: int = 4
    dtype: str = "bf16"
    threads: int = 2
    contexts: tuple[int, ...] = (512, 8192, 32768)
    prompts: tuple[int, ...] = (2048, 8192)
    sequence: int = 2048
    loads: int = 3
    budget_s: float = 45.0
    limit_s: float = 180.0
    deepseek_inference: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype {' or '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.threads, self.layers, self.sequence, self.loads, *self.contexts, *self.prompts) < 1:
            raise ValueError(f"expected positive sizes, got {self}")

    def config(self) -> da.DeepseekConfig:
        full = comparable(da.DeepseekConfig.from_pretrained(self.preset))
        dtype = str(DTYPES[self.dtype]).removeprefix("torch.")
        return full.replace(num_hidden_layers=self.layers, dtype=dtype)

    def is_reference(self) -> bool:
        """Whether this is the shape that the goals below were set for."""
        return (self.preset, self.layers, self.dtype, self.threads) == ("deepseek-v2-lite", 4, "bf16", 2)


# How many times better than the row's baseline (the last one: the value itself), for the reference shape.
GOALS = {
    "decode at 512": 1.5,
    "decode at 8192": 10,
    "decode at 32768": 30,
    "prefill 2048": 2.5,
    "prefill 8192": 6,
    "training step 2048": 2,
    "loading": 1,
    "loading, peak memory": 1.15,
}


class Bench:
    """Both models, and the measurements on them."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings, self.config = settings, settings.config()
        self.deepseek: DeepseekInference | None = None
        if settings.deepseek_inference:
            room = max(*settings.prompts, *settings.contexts, CHECKED) + MOST_STEPS
            about = (settings.deepseek_inference, self.config, settings.dtype, settings.threads, room)
            self.deepseek = DeepseekInference(*about)
        self.ours = random_model(self.config, DTYPES[settings.dtype])
        self.native = native_twin(self.ours)
        self.native_class = type(self.native).__name__
        self.difference = check_same_logits(self.ours, self.native)

    def row(self, name: str, unit: str, better: str, results: dict[str, Samples], note: str = "") -> Row:
        goal = GOALS.get(name) if self.settings.is_reference() else None
        baseline = {"loading": READ, "loading, peak memory": None}.get(name, NATIVE)
        return Row(name, unit, better, results, baseline=baseline, goal=goal, note=note)

    # -------------------------------------------------------------- decode and prefill

    def decode(self) -> Iterator[Row]:
        """Milliseconds a token, batch 1, on a cache of random latents."""
        for context in self.settings.contexts:
            steps = MOST_STEPS - 2 if context < 4096 else 8
            actions = decode_actions(self.ours, self.native, context, steps + 2)
            seconds = interleave(actions, rounds=steps, warmup=2, budget_s=self.settings.budget_s)
            why = self.add_deepseek(seconds, lambda one, n=context, k=steps, **limits: one.decode(n, k, 2, **limits))
            note = "; ".join(filter(None, (_fewer(seconds, steps, "steps"), why)))
            results = {name: s.map(lambda t: 1e3 * t) for name, s in seconds.items()}
            yield self.row(f"decode at {context}", "ms/token", "lower", results, note)

    def prefill(self) -> Iterator[Row]:
        """Tokens a second of a prompt into an empty cache, batch 1, logits of the last token."""
        for prompt in self.settings.prompts:
            actions = prefill_actions(self.ours, self.native, prompt)
            note = self.drop_slow(actions, prompt)
            seconds = interleave(actions, rounds=3, budget_s=self.settings.budget_s)
            why = self.add_deepseek(seconds, lambda one, n=prompt, **limits: one.prefill(n, 3, **limits))
            results = {name: s.map(lambda t, n=prompt: n / t) for name, s in seconds.items()}
            note = "; ".join(filter(None, (note or _fewer(seconds, 3, "runs"), why)))
            yield self.row(f"prefill {prompt}", "tokens/s", "higher", results, note)

    def add_deepseek(self, seconds: dict[str, Samples], time_it: Callable[..., Samples | str]) -> str:
        """Adds what DeepSeek's code takes, where it was brought along; or says why it could not."""
        if self.deepseek is None:
            return ""
        found = time_it(self.deepseek, budget_s=self.settings.budget_s, limit_s=self.settings.limit_s)
        if isinstance(found, str):
            return found
        seconds[DEEPSEEK] = found
        return ""

    def drop_slow(self, actions: dict[str, Action], prompt: int) -> str:
        """Takes transformers out where an eighth of the prompt says that all of it needs more than the limit."""
        if prompt < 512:
            return ""
        probe = prefill_actions(self.ours, self.native, prompt // 8)[NATIVE]
        at_least = 8 * interleave({NATIVE: probe}, rounds=1, warmup=0)[NATIVE].median
        if at_least <= self.settings.limit_s:
            return ""
        del actions[NATIVE]
        rate = f"{prompt / at_least:.3g} tokens/s for {prompt // 8} tokens"
        return f"{NATIVE} not run: at least {at_least:.0f} s at its rate of {rate}"

    # -------------------------------------------------------------- training

    def train(self) -> Iterator[Row]:
        """Steps of forward, loss and backward, and their memory, in processes of their own that can be stopped."""
        s = self.settings
        job = {"config": self.config.to_dict(), "dtype": s.dtype, "threads": s.threads, "tokens": s.sequence}
        found = {
            who: run_isolated("train", native=who == NATIVE, repeats=3, limit_s=s.limit_s, **job)
            for who in (OURS, NATIVE)
        }
        stopped = [
            f"{who} stopped after {s.limit_s:.0f} s, before the first step ended" for who in found if not found[who]
        ]
        found = {who: steps for who, steps in found.items() if steps}
        if OURS not in found:
            raise ValueError(f"expected a training step within the limit of {s.limit_s:g} s: {'; '.join(stopped)}")
        # The first step is the warm-up, unless it is the only one.
        seconds = {who: Samples(tuple(step["seconds"] for step in steps[1:] or steps)) for who, steps in found.items()}
        name = f"training step {s.sequence}"
        yield self.row(name, "s/step", "lower", seconds, "; ".join(stopped))
        peaks = {who: Samples((steps[-1]["peak"] / GIGA,)) for who, steps in found.items()}
        note = "resident memory, weights and gradients included"
        yield self.row(f"{name}, memory at peak", "GB", "lower", peaks, note)
        beyond = {who: Samples(((steps[-1]["peak"] - steps[-1]["before"]) / GIGA,)) for who, steps in found.items()}
        yield self.row(f"{name}, memory beyond the weights", "GB", "lower", beyond)

    # -------------------------------------------------------------- loading

    def load(self, folder: Path) -> Iterator[Row]:
        """Loading the published layout, warm, each time in a fresh process, against reading the same bytes."""
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        jobs = {OURS: "load ours", NATIVE: "load native", READ: "read"}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for _ in range(self.settings.loads):
            for name, task in jobs.items():
                more = {"threads": self.settings.threads, "native_class": self.native_class}
                runs[name] += run_isolated(task, folder=str(folder), **more)
        rates = {name: Samples(tuple(size / GIGA / one["seconds"] for one in found)) for name, found in runs.items()}
        note = f"{size / GIGA:.2f} GB of files in the page cache; plain read: the same files into new memory"
        yield self.row("loading", "GB/s", "higher", rates, note)
        peaks = {
            name: Samples(tuple((one["peak"] - one["before"]) / size for one in found)) for name, found in runs.items()
        }
        yield self.row("loading, peak memory", "peak / file bytes", "lower", peaks, "resident memory after imports")

    # -------------------------------------------------------------- profile

    def profile(self, parts: tuple[str, ...]) -> Iterator[str]:
        """Which operators take our model's time."""
        s, both = self.settings, (self.ours, self.native)
        if "decode" in parts:
            for context in s.contexts:
                yield f"decode at {context}: {hot_spots(decode_actions(*both, context, 6)[OURS], runs=4)}"
        if "prefill" in parts:
            yield f"prefill {s.prompts[0]}: {hot_spots(prefill_actions(*both, s.prompts[0])[OURS])}"
        if "train" in parts:
            ids = torch.randint(self.config.vocab_size, (1, s.sequence), generator=torch.Generator().manual_seed(4))
            yield f"training step {s.sequence}: {hot_spots(lambda: training_step(self.ours, ids))}"
            self.ours.zero_grad(set_to_none=True)

    def free(self) -> None:
        """Drops the models, before other processes need the memory."""
        del self.ours, self.native
        if self.deepseek is not None:
            self.deepseek.close()


def _fewer(seconds: dict[str, Samples], rounds: int, what: str) -> str:
    short = [f"{name} {len(s.values)} of {rounds} {what}" for name, s in seconds.items() if len(s.values) < rounds]
    return f"out of time after: {', '.join(short)}" if short else ""


PARTS = ("decode", "prefill", "train", "load")


def run(
    settings: Settings,
    parts: tuple[str, ...] = PARTS,
    *,
    profiled: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Measures `parts`.

    Args:
        profiled: also say which operators take our model's time, in the report's notes.
        on_row: called with each row as it comes.

    Raises:
        ValueError: a part is unknown, or the two models do not compute the same.
    """
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown)) or 'none'}")
    started, busy = time.perf_counter(), load_average()
    bench = Bench(settings)
    rows: list[Row] = []

    def take(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            on_row(row)

    for part in ("decode", "prefill"):
        if part in parts:
            take(getattr(bench, part)())
    notes = [f"logits of both models agree to {bench.difference:.2g} (relative, {settings.dtype})"]
    notes += () if bench.deepseek is None else bench.deepseek.notes
    if profiled:
        notes += bench.profile(parts)
    with tempfile.TemporaryDirectory(prefix="deepseek-arch-benchmark-") as folder:
        if "load" in parts:
            da.save(bench.ours, folder)
        bench.free()
        if "train" in parts:
            take(bench.train())
        if "load" in parts:
            take(bench.load(Path(folder)))
    notes.append(f"all of it took {(time.perf_counter() - started) / 60:.0f} minutes; load average before: {busy}")
    settings_used = asdict(settings) | {"parameters": da.count_parameters(bench.config).total}
    return Report("model", settings_used, tuple(rows), tuple(notes))
