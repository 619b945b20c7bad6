"""Sparse attention at V3.2's widths: decoding and prompts against transformers' own V3.2 and our dense attention.

Each measurement runs in a process of its own, which has its memory peak, may be stopped, and cannot take more memory
than allowed: transformers scores all queries, heads and keys at once. Contexts to decode on are random states, written
to the caches directly. Beside the wall clock there is the CPU's time of one thread or several, which a busy machine
changes less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import deepseek_arch as da

from ..core.machine import load_average
from ..core.report import NATIVE, OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.workers import run_isolated

__all__ = ["DENSE", "Settings", "main", "model_config", "run"]

DENSE = "ours, dense"
TASKS = "benchmarks.models.sparse_tasks"
GIGA = 1e9
# Times as fast as transformers, or of its memory beyond the weights: decoding at 32k, and a prompt of 8k.
GOALS = {"decode at 32768": 30.0, "prompt of 8192": 5.0, "prompt of 8192, memory beyond the weights": 10.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Lengths and sizes of the measurement.

    Raises:
        ValueError: a size that is not positive.
    """

    preset: Annotated[str, "preset, config.json or checkpoint folder of a model with sparse attention"] = (
        "deepseek-v3.2"
    )
    layers: Annotated[int, "decoder layers, without experts"] = 2
    contexts: Annotated[tuple[int, ...], "cached tokens to decode on"] = (2048, 4096, 8192, 32768, 65536)
    prompts: Annotated[tuple[int, ...], "tokens of the prompts"] = (4096, 8192)
    only: Annotated[tuple[str, ...], "decode, prompt or both"] = ("decode", "prompt")
    repeats: Annotated[int, "steps of a measurement, after one that does not count"] = 3
    dtype: Annotated[str, "bf16 or fp32"] = "bf16"
    threads: Annotated[int, "threads of torch"] = 2
    memory: Annotated[float, "most memory of a process, in GB"] = 20.0
    limit_s: Annotated[float, "most seconds of a measurement"] = 600.0
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        sizes = (self.layers, self.repeats, self.threads, self.memory, self.limit_s, *self.contexts, *self.prompts)
        if min(sizes) <= 0 or self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"expected positive sizes and dtype bf16 or fp32, got {self}")
        if not set(self.only) <= {"decode", "prompt"}:
            raise ValueError(f"expected only decode and prompt, got {', '.join(self.only)}")


def model_config(settings: Settings) -> da.DeepseekConfig:
    """Returns the config with few dense layers and a small vocabulary: what is measured is attention.

    Raises:
        ValueError: its attention is dense.
    """
    config = da.DeepseekConfig.from_pretrained(settings.preset)
    if not config.is_sparse_attention:
        raise ValueError(f"expected a model with sparse attention, got {settings.preset}")
    layers = settings.layers
    return config.replace(
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_nextn_predict_layers=0,
        vocab_size=min(config.vocab_size, 4096),
        quantization_config=None,
        indexer_types=None,
    )


def run(settings: Settings, *, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures decoding at each context, then each prompt."""
    busy, rows = load_average(), []
    jobs = [(f"decode at {n}", "decode", n) for n in settings.contexts]
    jobs += [(f"prompt of {n}", "prompt", n) for n in settings.prompts]
    for name, kind, tokens in (job for job in jobs if job[1] in settings.only):
        for row in _rows(settings, name, kind, tokens):
            rows.append(row)
            on_row(row)
    notes = (f"load average before: {busy}, after: {load_average()}",)
    return Report("sparse", asdict(settings), tuple(rows), notes)


def _rows(settings: Settings, name: str, kind: str, tokens: int) -> Iterator[Row]:
    """Measures all contestants in one situation: time, the CPU's time, and memory."""
    job = {"task": kind, "tokens": tokens, "config": model_config(settings).to_dict(), "memory": settings.memory}
    job |= {"dtype": settings.dtype, "threads": settings.threads, "repeats": settings.repeats + 1}
    found, failed = {}, []
    for who in (OURS, DENSE, NATIVE):
        try:
            steps = run_isolated(TASKS, job | {"who": who}, settings.limit_s)
        except RuntimeError as error:
            steps = []
            if not any(words in str(error) for words in ("allocate memory", "MemoryError")):
                raise
            failed.append(f"{who} needs more than {settings.memory:g} GB")
        if steps:
            found[who] = steps[1:] or steps  # the first step is the warm-up, unless it is the only one
        elif not failed or not failed[-1].startswith(who):
            failed.append(f"{who} did not end a step in {settings.limit_s:g} s")
    if OURS not in found:
        raise ValueError(f"expected {name} to run within the limits: {'; '.join(failed)}")
    columns = {
        "": ("s", lambda step: step["seconds"]),
        ", CPU time": ("s", lambda step: step["cpu"]),
        ", memory beyond the weights": ("GB", lambda step: (step["peak"] - step["before"]) / GIGA),
    }
    for title, (unit, value) in columns.items():
        results = {who: Samples(tuple(value(step) for step in steps)) for who, steps in found.items()}
        goal = GOALS.get(name + title) if settings.preset == "deepseek-v3.2" else None
        yield Row(name + title, unit, "lower", results, baseline=NATIVE, goal=goal, note="; ".join(failed))


def main(settings: Settings) -> int:
    """Runs the command `sparse`."""
    name = f"sparse-{settings.layers}-layers-{settings.dtype}-{settings.threads}-threads.json"
    show_and_save(run(settings, on_row=print_progress), settings.out or RESULTS / name)
    return 0
