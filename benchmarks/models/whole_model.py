"""The whole model against transformers' native one, on the same weights and threads.

Decoding, prefill, batches, weights kept in FP8, float32, small models: in one process, interleaved, on two clocks,
beside the limit that the machine's measured ceilings set. Training steps and loading: in processes of their own, for
their memory. Nothing is timed before the logits of both agree.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import deepseek_arch as da
from deepseek_kernels.common.cpu import library_obstacle

from ..core.machine import load_average
from ..core.report import NATIVE, OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.timing import Clocked
from ..core.workers import run_isolated
from .actions import decode_actions, prefill_actions, training_step
from .hot_spots import hot_spots
from .limits import training_work
from .model_parts import Bench
from .model_settings import GOALS, PARTS, Settings
from .timed_rows import Times

__all__ = ["PARTS", "Settings", "main", "run"]

TASKS = "benchmarks.models.isolated_tasks"
READ = "plain read"
GIGA = 1e9


# ------------------------------------------------------------------ training


def train(bench: Bench) -> Iterator[Row]:
    """Steps of forward, loss and backward, and their memory, in processes of their own that can be stopped."""
    s = bench.settings
    job = {"config": bench.config.to_dict(), "dtype": s.dtype, "threads": s.threads, "tokens": s.sequence}
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
    yield from _training_rows(bench, steps_of, stopped)


def _training_rows(bench: Bench, steps_of: dict[str, list[dict[str, float]]], stopped: list[str]) -> Iterator[Row]:
    s, goals = bench.settings, bench.settings.is_reference()

    def samples(steps: list[dict[str, float]], key: str) -> Samples:
        # The first step is the warm-up, unless it is the only one.
        return Samples(tuple(step[key] for step in steps[1:] or steps))

    seconds = {name: Clocked(samples(steps, "seconds"), samples(steps, "cpu")) for name, steps in steps_of.items()}
    title = f"training step {s.sequence}"
    limit = (bench.ceilings, training_work(bench.config, s.dtype, s.sequence), s.dtype)
    faults = ", ".join(f"{name} {samples(steps, 'faults').median:,.0f}" for name, steps in steps_of.items())
    times = Times(title, seconds, remarks=[*stopped, f"page faults of a step: {faults}"])
    yield times.to_row("s/step", "lower", float, goals=goals, limit=limit)
    peaks = {name: Samples((steps[-1]["peak"] / GIGA,)) for name, steps in steps_of.items()}
    note = "resident memory, weights and gradients included"
    yield _row(f"{title}, memory at peak", "GB", "lower", peaks, NATIVE, goals, note)
    beyond = {name: Samples(((steps[-1]["peak"] - steps[-1]["before"]) / GIGA,)) for name, steps in steps_of.items()}
    yield _row(f"{title}, memory beyond the weights", "GB", "lower", beyond, NATIVE, goals)


def _row(
    name: str, unit: str, better: str, results: dict[str, Samples], baseline: str | None, goals: bool, note: str = ""
) -> Row:
    goal = GOALS.get(name) if goals else None
    return Row(name, unit, better, results, baseline=baseline, goal=goal, note=note)


# ------------------------------------------------------------------ loading


def load(bench: Bench, folder: Path) -> Iterator[Row]:
    """Loading the published layout, warm, each time in a fresh process, against reading the same bytes."""
    size, goals = sum(file.stat().st_size for file in folder.glob("*.safetensors")), bench.settings.is_reference()
    jobs = {OURS: "load ours", NATIVE: "load native", READ: "read"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(bench.settings.loads):
        for name, task in jobs.items():
            job = {"task": task, "threads": bench.settings.threads, "native_class": bench.native_class}
            runs[name] += run_isolated(TASKS, job | {"folder": str(folder)})
    rates = {name: Samples(tuple(size / GIGA / one["seconds"] for one in each)) for name, each in runs.items()}
    note = f"{size / GIGA:.2f} GB of files in the page cache; plain read: the same files into new memory"
    yield _row("loading", "GB/s", "higher", rates, READ, goals, note)
    peaks = {name: Samples(tuple((one["peak"] - one["before"]) / size for one in each)) for name, each in runs.items()}
    note = "resident memory after imports"
    yield _row("loading, peak memory", "peak / file bytes", "lower", peaks, None, goals, note)


# ------------------------------------------------------------------ profile


def profile(bench: Bench) -> Iterator[str]:
    """Yields the operators that take most of our model's time, for each part."""
    s, both = bench.settings, (bench.ours, bench.native)
    if s.runs("decode"):
        for context in s.contexts:
            yield f"decode at {context}: {hot_spots(decode_actions(*both, context, 6)[OURS], runs=4)}"
    if s.runs("prefill"):
        yield f"prefill {s.prompts[0]}: {hot_spots(prefill_actions(*both, s.prompts[0])[OURS])}"
    if s.runs("train"):
        ids = torch.randint(bench.config.vocab_size, (1, s.sequence), generator=torch.Generator().manual_seed(4))
        yield f"training step {s.sequence}: {hot_spots(lambda: training_step(bench.ours, ids))}"
        bench.ours.zero_grad(set_to_none=True)


# ------------------------------------------------------------------ all of it


def run(settings: Settings, *, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures the parts `settings.only`.

    Args:
        on_row: called with each row as it comes.

    Raises:
        ValueError: the two models do not compute the same.
    """
    started, busy = time.perf_counter(), load_average()
    bench = Bench(settings)
    rows: list[Row] = []

    def add(part: str, new: Callable[[], Iterator[Row]]) -> None:
        if settings.runs(part):
            for row in new():
                rows.append(row)
                on_row(row)
            gc.collect()  # a model of the part

    for part in ("decode", "prefill", "kept"):
        add(part, getattr(bench, part))
    notes = [f"logits of both models agree to {bench.difference:.2g} (relative, {settings.dtype})", _about_ours()]
    notes += [str(bench.ceilings)]
    notes += () if bench.deepseek is None else bench.deepseek.notes
    if settings.profile:
        notes += profile(bench)
    with tempfile.TemporaryDirectory(prefix="deepseek-arch-benchmark-") as folder:
        if settings.runs("load"):
            da.save(bench.ours, folder)
        bench.free()
        for part in ("batches", "fp32", "small", "compiled"):
            add(part, getattr(bench, part))
        add("train", lambda: train(bench))
        add("load", lambda: load(bench, Path(folder)))
    after = load_average()
    minutes = (time.perf_counter() - started) / 60
    notes.append(f"all of it took {minutes:.0f} minutes; load average before: {busy}, after: {after}")
    facts: dict[str, Any] = {"ceilings": bench.ceilings.to_dict(), "load_before": busy, "load_after": after}
    about = asdict(settings) | {"parameters": da.count_parameters(bench.config).total}
    return Report("model", about, tuple(rows), tuple(notes), facts=facts)


def _about_ours() -> str:
    """A note on the operators that "ours" runs."""
    reason = library_obstacle(auto=True)
    return f"ours: {'C++ operators where there are any' if reason is None else f'references only, {reason}'}"


def main(settings: Settings) -> int:
    """Runs the command `model`."""
    s = settings
    print(_about_ours(), file=sys.stderr, flush=True)
    name = f"model-{Path(s.preset).stem}-{s.layers}-layers-{s.dtype}-{s.threads}-threads.json"
    show_and_save(run(settings, on_row=print_progress), s.out or RESULTS / name)
    return 0
