"""Time between operators: the calls and files of a decode step, and its time beside transformers'.

At small widths a step is spent between operators, not in them. Counts are the same in every run: of calls of Python
and C functions as `sys.setprofile` reports them, and of the package's files whose functions run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

import deepseek_arch as da
from deepseek_arch.checkpoint.synthetic import write_checkpoint

from ..core.machine import load_average
from ..core.report import NATIVE, OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.timing import interleave
from .actions import Action
from .contestants import DTYPES, comparable, native_twin, random_model

__all__ = ["PARTS", "Settings", "count_calls", "decode_step", "files_of", "main", "run", "visited_files"]

PARTS = ("calls", "files", "time")
PACKAGE = Path(da.__file__).resolve().parent
CONTEXT = 32  # cached tokens before the step
# Files of deepseek_arch that an action may visit, and calls of a decode step of `tiny` with 7 layers.
# Calls include six a layer for the choice of the two head projections, which the C++ library makes one call each.
MOST_FILES = {"load": 16, "decode step": 9}
MOST_CALLS = 2740


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Models and sizes to measure.

    Raises:
        ValueError: an unknown dtype, or a size that is not positive.
    """

    presets: Annotated[tuple[str, ...], "models whose steps are timed"] = ("tiny", "mini")
    layers: Annotated[int, "of the model whose calls are counted; timed models have all of theirs"] = 7
    batches: Annotated[tuple[int, ...], "rows of the timed steps"] = (1, 8, 64)
    dtype: Annotated[str, "fp32 or bf16"] = "fp32"
    threads: int = 1
    rounds: Annotated[int, "counted steps of each contestant"] = 30
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype {' or '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.threads, self.layers, self.rounds, *self.batches) < 1:
            raise ValueError(f"expected positive sizes, got {self}")


def main(settings: Settings) -> int:
    """Runs the command `overhead`."""
    show_and_save(run(settings, on_row=print_progress), settings.out or RESULTS / "overhead.json")
    return 0


def _run_profiled(action: Callable[[], object], report: Callable[[Any, str, Any], None]) -> None:
    sys.setprofile(report)
    try:
        action()
    finally:
        sys.setprofile(None)


def count_calls(action: Callable[[], object]) -> int:
    """Returns how many Python and C functions `action` calls, itself not counted."""
    calls = 0

    def report(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    _run_profiled(action, report)
    return calls - 2  # the action, and the end of profiling


def visited_files(action: Callable[[], object]) -> list[str]:
    """Returns the files of deepseek_arch with functions that `action` runs, relative to the package, sorted.

    What runs only because a module is imported for the first time does not count: the action runs once before.
    """
    action()
    names: set[str] = set()

    def report(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names.add(frame.f_code.co_filename)

    _run_profiled(action, report)
    paths = (Path(name) for name in names)
    return sorted(path.relative_to(PACKAGE).as_posix() for path in paths if path.is_relative_to(PACKAGE))


def decode_step(model: da.DeepseekLM, batch: int = 1, steps: int = 1000) -> Action:
    """Returns an action that decodes one more token of each row, behind a cache with room for so many steps."""
    ids = torch.randint(model.config.vocab_size, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(batch, capacity=CONTEXT + steps)
    with torch.inference_mode():
        model(ids, cache=cache)

    @torch.inference_mode()
    def step() -> None:
        model(ids[:, :1], cache=cache)

    return step


def _native_step(twin: Any, batch: int) -> Action:
    from transformers import DynamicCache

    ids = torch.randint(twin.config.vocab_size, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=twin.config)
    with torch.inference_mode():
        twin(ids, past_key_values=cache)

    @torch.inference_mode()
    def step() -> None:
        twin(ids[:, :1], past_key_values=cache)

    return step


def files_of(what: str) -> list[str]:
    """Returns the files that one of these visits: "load", "decode step", "FP8 linear".

    Of loading, those that building the same model from its config does not visit.

    Raises:
        ValueError: something else.
    """
    config = da.DeepseekConfig.from_pretrained("tiny")
    if what == "load":
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, comparable(config))
            building = visited_files(lambda: da.DeepseekLM(da.DeepseekConfig.from_pretrained(folder)))
            return sorted(set(visited_files(lambda: da.load(folder))) - set(building))
    if what == "decode step":
        return visited_files(decode_step(random_model(comparable(config), torch.float32)))
    if what == "FP8 linear":
        layer = da.FP8Linear.quantize(da.Linear(256, 384, bias=False))
        x = torch.randn(4, 256)
        return visited_files(lambda: layer(x))
    raise ValueError(f"expected load, decode step or FP8 linear, got {what!r}")


def _counted(value: int) -> Samples:
    return Samples((float(value),))


def _calls(settings: Settings) -> Iterator[Row]:
    config = comparable(da.DeepseekConfig.from_pretrained("tiny")).replace(num_hidden_layers=settings.layers)
    ours = random_model(config, torch.float32)
    results = {}
    for name, step in ((OURS, decode_step(ours)), (NATIVE, _native_step(native_twin(ours), 1))):
        step()
        results[name] = _counted(count_calls(step))
    goal = results[NATIVE].median / MOST_CALLS if settings.layers == 7 else None
    yield Row(f"tiny, {settings.layers} layers: calls", "calls", "lower", results, baseline=NATIVE, goal=goal)


def _files() -> Iterator[Row]:
    for what in ("load", "decode step", "FP8 linear"):
        files = files_of(what)
        goal = MOST_FILES.get(what)
        note = ", ".join(files)
        yield Row(f"{what}: files", "files", "lower", {OURS: _counted(len(files))}, goal=goal, note=note)


def _times(settings: Settings) -> Iterator[Row]:
    for preset in settings.presets:
        config = comparable(da.DeepseekConfig.from_pretrained(preset))
        ours = random_model(config, DTYPES[settings.dtype])
        twin = native_twin(ours)
        for batch in settings.batches:
            actions = {OURS: decode_step(ours, batch), NATIVE: _native_step(twin, batch)}
            seconds = interleave(actions, rounds=settings.rounds, warmup=3)
            results = {name: samples.map(lambda s: s * 1e3) for name, samples in seconds.items()}
            # At most transformers' time for few rows.
            goal = 1.0 if batch <= 8 else None
            yield Row(f"{preset}, batch {batch}: decode step", "ms", "lower", results, baseline=NATIVE, goal=goal)


def run(settings: Settings, parts: tuple[str, ...] = PARTS, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures the parts.

    Raises:
        ValueError: an unknown part.
    """
    if set(parts) - set(PARTS):
        raise ValueError(f"expected parts among {', '.join(PARTS)}, got {', '.join(parts)}")
    torch.set_num_threads(settings.threads)
    makers = {"calls": lambda: _calls(settings), "files": _files, "time": lambda: _times(settings)}
    rows = []
    for part in parts:
        for row in makers[part]():
            rows.append(row)
            on_row(row)
    notes = (f"load average at the start {load_average()}",)
    return Report("overhead", asdict(settings), tuple(rows), notes)
