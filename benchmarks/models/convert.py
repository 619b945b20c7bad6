"""`convert` against copying: every direction between FP8 and BF16, single and stacked experts.

A conversion reads one size and writes another; it is compared with copying the larger of the two on the same disk.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import convert
from deepseek_arch.checkpoint.synthetic import write_checkpoint

from ..core.machine import load_average
from ..core.report import OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save

__all__ = ["Settings", "main", "run"]

COPY, SYNCED = "copy", "copy and sync"
GIGA = 1e9
GOAL = 0.5  # of the speed of a copy

# (format, stacked) -> (format, stacked)
FP8, BF16, FP8_STACKED, BF16_STACKED = ("fp8", False), ("bf16", False), ("fp8", True), ("bf16", True)
DIRECTIONS = (
    (FP8, BF16),
    (BF16, FP8),
    (FP8, FP8_STACKED),
    (FP8_STACKED, FP8),
    (FP8, BF16_STACKED),
    (BF16_STACKED, FP8),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size of the checkpoint and rounds of the benchmark.

    Raises:
        ValueError: a size that is not positive.
    """

    preset: Annotated[str, "whose sizes the tensors have"] = "deepseek-v3"
    gigabytes: Annotated[float, "size in BF16, of which FP8 has half; the disk needs four times as much"] = 10.0
    rounds: Annotated[int, "times that each contestant runs"] = 3
    threads: Annotated[int, "threads of the conversion"] = 2
    max_shard_size: Annotated[str, "of the files that are written"] = "5GB"
    folder: Annotated[str | None, "folder to write to (default: the system's place for temporary files)"] = None
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        if self.gigabytes <= 0 or self.rounds < 1 or self.threads < 1:
            raise ValueError(f"expected positive sizes, got {self}")

    def config(self) -> da.DeepseekConfig:
        """One layer of the preset's width, with as many experts as fill the checkpoint."""
        changes = {
            "vocab_size": 1024,
            "num_hidden_layers": 1,
            "num_nextn_predict_layers": 0,
            "first_k_dense_replace": 0,
        }
        changes |= {"n_routed_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
        one = da.DeepseekConfig.from_pretrained(self.preset).replace(**changes)
        expert = da.count_parameters(one).expert
        others = da.weight_bytes(one, "bf16") - 2 * expert
        return one.replace(n_routed_experts=max(1, round((self.gigabytes * GIGA - others) / (2 * expert))))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _name(kind: tuple[str, bool]) -> str:
    return kind[0].upper() + (" stacked" if kind[1] else "")


def _copy(source: Path, target: Path, sync: bool) -> None:
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        if sync:
            with (target / file.name).open("r+b") as stream:
                os.fsync(stream.fileno())


class Bench:
    """Checkpoints of all four kinds, converted from the FP8 one when first needed."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.kinds: dict[tuple[str, bool], Path] = {}

    def stored(self, kind: tuple[str, bool]) -> Path:
        if kind not in self.kinds:
            path = self.folder / _name(kind)
            if kind == FP8:
                write_checkpoint(path, self.settings.config(), shards=2)
            else:
                self.convert(self.stored(FP8), path, kind)
            self.kinds[kind] = path
        return self.kinds[kind]

    def forget(self, keep: set[tuple[str, bool]]) -> None:
        """Deletes the checkpoints that are not needed next, to save disk space."""
        for kind in set(self.kinds) - keep - {FP8}:
            shutil.rmtree(self.kinds.pop(kind))

    def convert(self, source: Path, target: Path, kind: tuple[str, bool]) -> None:
        convert(source, target, kind[0], kind[1], self.settings.max_shard_size)

    def row(self, old: tuple[str, bool], new: tuple[str, bool]) -> Row:
        """Measures one direction, in gigabytes of the larger checkpoint per second."""
        source, result = self.stored(old), self.stored(new)
        larger = max(source, result, key=_size)
        size = _size(larger)
        seconds = self.interleave(
            {
                OURS: lambda target: self.convert(source, target, new),
                COPY: lambda target: _copy(larger, target, sync=False),
                SYNCED: lambda target: _copy(larger, target, sync=True),
            }
        )
        rates = {name: samples.map(lambda t: size / GIGA / t) for name, samples in seconds.items()}
        note = f"{_size(source) / GIGA:.2f} GB read, {_size(result) / GIGA:.2f} GB written; ours syncs"
        return Row(f"{_name(old)} to {_name(new)}", "GB/s", "higher", rates, baseline=COPY, goal=GOAL, note=note)

    def interleave(self, actions: dict[str, Callable[[Path], None]]) -> dict[str, Samples]:
        """Times A, B, C, A, B, C, ...: each writes a new folder, deleted afterwards, on a synced disk."""
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(self.settings.rounds):
            for name, action in actions.items():
                target = self.folder / "new"
                os.sync()
                gc.collect()
                started = time.perf_counter()
                action(target)
                seconds[name].append(time.perf_counter() - started)
                shutil.rmtree(target)
        return {name: Samples(tuple(values)) for name, values in seconds.items()}


def run(settings: Settings, *, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures every direction; the files that it writes are deleted again."""
    torch.set_num_threads(settings.threads)
    busy, started = load_average(), time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory(prefix="deepseek-arch-benchmark-", dir=settings.folder) as folder:
        bench = Bench(settings, Path(folder))
        for old, new in DIRECTIONS:
            bench.forget(keep={old, new})
            rows.append(bench.row(old, new))
            on_row(rows[-1])
    notes = (
        "GB/s of the larger of the files read and written, which is also what is copied; in the page cache as far as "
        "it fits, each run begun with nothing left to sync",
        f"all of it took {(time.perf_counter() - started) / 60:.0f} minutes; load average before: {busy}",
    )
    return Report("convert", asdict(settings), tuple(rows), notes)


def main(settings: Settings) -> int:
    """Runs the command `convert`."""
    show_and_save(run(settings, on_row=print_progress), settings.out or RESULTS / "convert.json")
    return 0
