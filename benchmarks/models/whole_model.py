"""The whole model against transformers' native one, on the same weights and threads.

Decoding, prefill, a training step, loading a checkpoint: in one process, interleaved; memory in processes of their own.
Nothing is timed before the logits of both agree.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch

import deepseek_arch as da

from ..core.machine import load_average
from ..core.report import NATIVE, OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.timing import interleave
from ..core.workers import run_isolated
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

__all__ = ["PARTS", "Settings", "main", "run"]

PARTS = ("decode", "prefill", "train", "load")
TASKS = "benchmarks.models.isolated_tasks"

READ = "plain read"
GIGA = 1e9
MOST_STEPS = 22  # of a decode


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, parts and limits of the benchmark.

    Raises:
        ValueError: an unknown dtype or part, or a size that is not positive.
    """

    preset: Annotated[str, "a preset name, a config.json or a checkpoint folder"] = "deepseek-v2-lite"
    layers: Annotated[int, "decoder layers to keep"] = 4
    dtype: Annotated[str, "bf16 or fp32"] = "bf16"
    threads: Annotated[int, "of every contestant"] = 2
    only: Annotated[tuple[str, ...], "parts to measure"] = PARTS
    contexts: Annotated[tuple[int, ...], "cached tokens to decode at"] = (512, 8192, 32768)
    prompts: Annotated[tuple[int, ...], "prompt lengths to prefill"] = (2048, 8192)
    sequence: Annotated[int, "tokens of the training step"] = 2048
    loads: Annotated[int, "times that each contestant loads the checkpoint"] = 3
    budget_s: Annotated[float, "seconds after which a slow contestant of one row is not run again"] = 45.0
    limit_s: Annotated[float, "seconds that one run of transformers, or a row of DeepSeek's code, may take"] = 180.0
    deepseek_inference: Annotated[str, "folder `inference` of DeepSeek-V3's repository: a contestant too"] = ""
    profile: Annotated[bool, "also show which operators take our model's time"] = False
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype {' or '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.threads, self.layers, self.sequence, self.loads, *self.contexts, *self.prompts) < 1:
            raise ValueError(f"expected positive sizes, got {self}")
        if not self.only or not set(self.only) <= set(PARTS):
            raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(self.only) or 'none'}")

    def config(self) -> da.DeepseekConfig:
        full = comparable(da.DeepseekConfig.from_pretrained(self.preset))
        dtype = str(DTYPES[self.dtype]).removeprefix("torch.")
        return full.replace(num_hidden_layers=self.layers, dtype=dtype)

    def is_reference(self) -> bool:
        """Returns True for the model and threads for which the goals below were set."""
        return (self.preset, self.layers, self.dtype, self.threads) == ("deepseek-v2-lite", 4, "bf16", 2)


# Times better than the row's baseline (the last one: the value itself), for the reference settings.
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
        """Adds the times of DeepSeek's code, if the user has it; returns why there are none."""
        if self.deepseek is None:
            return ""
        samples = time_it(self.deepseek, budget_s=self.settings.budget_s, limit_s=self.settings.limit_s)
        if isinstance(samples, str):
            return samples
        seconds[DEEPSEEK] = samples
        return ""

    def drop_slow(self, actions: dict[str, Action], prompt: int) -> str:
        """Removes transformers if the time of an eighth of the prompt shows that it would exceed the limit."""
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
        steps_of: dict[str, list[dict[str, float]]] = {}
        stopped = []
        for name in (OURS, NATIVE):
            task = {"task": "train", "native": name == NATIVE, "repeats": 3, **job}
            if steps := run_isolated(TASKS, task, s.limit_s):
                steps_of[name] = steps
            else:
                stopped.append(f"{name} stopped after {s.limit_s:.0f} s, before the first step ended")
        if OURS not in steps_of:
            raise ValueError(f"expected a training step within the limit of {s.limit_s:g} s: {'; '.join(stopped)}")
        # The first step is the warm-up, unless it is the only one.
        seconds = {
            name: Samples(tuple(step["seconds"] for step in steps[1:] or steps)) for name, steps in steps_of.items()
        }
        title = f"training step {s.sequence}"
        yield self.row(title, "s/step", "lower", seconds, "; ".join(stopped))
        peaks = {name: Samples((steps[-1]["peak"] / GIGA,)) for name, steps in steps_of.items()}
        note = "resident memory, weights and gradients included"
        yield self.row(f"{title}, memory at peak", "GB", "lower", peaks, note)
        beyond = {
            name: Samples(((steps[-1]["peak"] - steps[-1]["before"]) / GIGA,)) for name, steps in steps_of.items()
        }
        yield self.row(f"{title}, memory beyond the weights", "GB", "lower", beyond)

    # -------------------------------------------------------------- loading

    def load(self, folder: Path) -> Iterator[Row]:
        """Loading the published layout, warm, each time in a fresh process, against reading the same bytes."""
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        jobs = {OURS: "load ours", NATIVE: "load native", READ: "read"}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for _ in range(self.settings.loads):
            for name, task in jobs.items():
                job = {"task": task, "threads": self.settings.threads, "native_class": self.native_class}
                runs[name] += run_isolated(TASKS, job | {"folder": str(folder)})
        rates = {name: Samples(tuple(size / GIGA / one["seconds"] for one in each)) for name, each in runs.items()}
        note = f"{size / GIGA:.2f} GB of files in the page cache; plain read: the same files into new memory"
        yield self.row("loading", "GB/s", "higher", rates, note)
        peaks = {
            name: Samples(tuple((one["peak"] - one["before"]) / size for one in each)) for name, each in runs.items()
        }
        yield self.row("loading, peak memory", "peak / file bytes", "lower", peaks, "resident memory after imports")

    # -------------------------------------------------------------- profile

    def profile(self) -> Iterator[str]:
        """Yields the operators that take most of our model's time, for each part."""
        s, both, parts = self.settings, (self.ours, self.native), self.settings.only
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
        """Drops the models before other processes need the memory."""
        del self.ours, self.native
        if self.deepseek is not None:
            self.deepseek.close()


def _fewer(seconds: dict[str, Samples], rounds: int, what: str) -> str:
    """A remark on contestants that had too little time for all rounds."""
    short = [f"{name} {len(s.values)} of {rounds} {what}" for name, s in seconds.items() if len(s.values) < rounds]
    return f"out of time after: {', '.join(short)}" if short else ""


def run(settings: Settings, *, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures the parts `settings.only`.

    Args:
        on_row: called with each row as it comes.

    Raises:
        ValueError: the two models do not compute the same.
    """
    started, busy = time.perf_counter(), load_average()
    bench, parts = Bench(settings), settings.only
    rows: list[Row] = []

    def add(new: Iterator[Row]) -> None:
        for row in new:
            rows.append(row)
            on_row(row)

    for part in ("decode", "prefill"):
        if part in parts:
            add(getattr(bench, part)())
    notes = [f"logits of both models agree to {bench.difference:.2g} (relative, {settings.dtype})"]
    notes += () if bench.deepseek is None else bench.deepseek.notes
    if settings.profile:
        notes += bench.profile()
    with tempfile.TemporaryDirectory(prefix="deepseek-arch-benchmark-") as folder:
        if "load" in parts:
            da.save(bench.ours, folder)
        bench.free()
        if "train" in parts:
            add(bench.train())
        if "load" in parts:
            add(bench.load(Path(folder)))
    notes.append(f"all of it took {(time.perf_counter() - started) / 60:.0f} minutes; load average before: {busy}")
    facts = asdict(settings) | {"parameters": da.count_parameters(bench.config).total}
    return Report("model", facts, tuple(rows), tuple(notes))


def main(settings: Settings) -> int:
    """Runs the command `model`."""
    s = settings
    name = f"model-{Path(s.preset).stem}-{s.layers}-layers-{s.dtype}-{s.threads}-threads.json"
    show_and_save(run(settings, on_row=print_progress), s.out or RESULTS / name)
    return 0
