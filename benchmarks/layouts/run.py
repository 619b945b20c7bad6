"""Layouts over several devices: checked against one process, then timed. Started by torchrun, on GPUs or CPUs.

    torchrun --nproc-per-node 8 -m benchmarks parallel --layout tp=2,ep=4
    torchrun --nproc-per-node 8 -m benchmarks parallel --config deepseek-v2-lite --layout "ep=8; tp=2,ep=8; pp=2,ep=4"

First a narrow model of the same layers, heads and experts gives the loss and every gradient in float32 on each layout,
to be compared with one process. Then the model itself is trained on random tokens: time of a step, tokens/s, model FLOP
utilization, memory at the peak beside the planner's, bytes sent and their bandwidth, communication that nothing was
computed beside, a pipeline's bubble beside its simulation, each way of tokens to their experts, and decoding.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.planning.devices import DEVICES, Device
from deepseek_arch.planning.setup import TrainingSetup
from deepseek_arch.planning.training import plan_training

from ..core.machine import device_slug
from ..core.report import RESULTS, Report, Row
from ..core.tables import progress_line, summary_table
from .checks import Check, check_layouts
from .contestants import Contestant, config_within, contestants_of, cut_config, predicted_memory, training_setup
from .figures import device_named
from .layout_rows import Planned, rows_of
from .measure import (
    Measured,
    PeakMemory,
    count_bytes,
    gathered,
    measure_bubble,
    measure_decoding,
    profile_step,
    time_dispatches,
    time_steps,
)
from .training_run import LayoutRun

__all__ = ["PARTS", "Settings", "main", "measure"]

PARTS = ("check", "step", "memory", "bytes", "overlap", "bubble", "dispatch", "decode")
WAITS = "times of collectives include waiting for the last rank to reach them, and bandwidths are lower by that"
START = "torchrun --nproc-per-node 8 -m benchmarks parallel"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model, layouts and what to measure of them.

    Raises:
        ValueError: a size that is not positive, or an unknown part.
    """

    config: Annotated[str, "preset or folder with a config"] = "deepseek-v3"
    layers: Annotated[int, "layers of the model; 0 for as many as the plan says fit every layout (2 on a CPU)"] = 0
    layout: Annotated[str, "layouts, separated by spaces or semicolons; '' for a choice of what fits"] = ""
    schedule: Annotated[tuple[str, ...], "schedules of layouts with pp > 1"] = ("1F1B", "DualPipeV")
    dispatch: Annotated[tuple[str, ...], "ways of tokens to their experts, of layouts with ep > 1"] = (
        "rows",
        "choices",
        "nodes",
    )
    ranks_per_node: Annotated[int, "ranks of ep in a node, for dispatch 'nodes'; 0 for those of this machine"] = 0
    batch: Annotated[int, "rows of a step, of all ranks; 0 for 4 micro-batches a rank"] = 0
    micro_batch: Annotated[int, "rows that a rank runs at a time"] = 1
    sequence: Annotated[int, "tokens of a row"] = 4096
    recompute: Annotated[bool, "compute layers again in backward passes"] = False
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], "of the model; bfloat16 on a GPU, else float32"] = "auto"
    only: Annotated[tuple[str, ...], "parts to run"] = PARTS
    rounds: Annotated[int, "timed steps"] = 5
    warmup: Annotated[int, "steps before them"] = 2
    decode_batch: Annotated[int, "prompts of each data-parallel rank"] = 8
    decode_prompt: Annotated[int, "tokens of a prompt"] = 512
    decode_tokens: Annotated[int, "tokens to decode"] = 64
    seed: Annotated[int, "of weights and tokens"] = 0
    threads: Annotated[int, "threads of torch in each process, on a CPU"] = 1
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        sizes = (self.micro_batch, self.sequence, self.rounds, self.decode_batch, self.decode_prompt, self.threads)
        if min(sizes) < 1 or min(self.layers, self.batch, self.warmup, self.ranks_per_node) < 0:
            raise ValueError(f"expected positive sizes, got {self}")
        if self.decode_tokens < 2:
            raise ValueError(f"expected at least 2 tokens to decode, got {self.decode_tokens}")
        if not set(self.only) <= set(PARTS):
            raise ValueError(f"expected parts among {', '.join(PARTS)}, got {','.join(self.only)!r}")


@dataclass(frozen=True)
class Session:
    """Everything that all layouts have in common."""

    settings: Settings
    config: da.DeepseekConfig
    device: torch.device
    dtype: torch.dtype
    batch: int

    def training(self, contestant: Contestant) -> LayoutRun:
        s = self.settings
        return LayoutRun(
            self.config,
            contestant,
            batch=self.batch,
            micro_batch=s.micro_batch,
            sequence=s.sequence,
            dtype=self.dtype,
            device=self.device,
            recompute=s.recompute,
            seed=s.seed,
        )

    @property
    def known(self) -> Device | None:
        """The planner's device that this one is."""
        return device_named(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    def setup(self, contestant: Contestant) -> TrainingSetup | None:
        s, nbytes = self.settings, self.dtype.itemsize
        return training_setup(contestant, self.batch, s.micro_batch, s.sequence, s.recompute, nbytes)

    def planned(self, contestant: Contestant) -> Planned:
        """Returns what the planner says of a layout, as far as it knows its schedule and this device."""
        setup = self.setup(contestant)
        if setup is None:
            return Planned()
        memory = predicted_memory(self.config, contestant, setup, self.known or DEVICES["h800"])
        if self.known is None:
            return Planned(memory)
        plan = plan_training(self.config, contestant.layout, self.known, setup)
        return Planned(memory, plan.seconds.total, self.known.peak_bf16, plan.to_dict())


def measure(settings: Settings, device: torch.device) -> Report:
    """Checks and measures on the ranks of the default process group; every rank calls this and gets the report.

    Raises:
        ValueError: no layout fits, or the settings mean nothing.
    """
    session, chosen, notes = _prepare(settings, device)
    facts: dict[str, Any] = {"layers": session.config.num_hidden_layers, "ranks": dist.get_world_size()}
    facts |= {"batch": session.batch, "dtype": str(session.dtype).removeprefix("torch."), "layouts": {}}
    report = Report("parallel", asdict(settings), (), (*notes, WAITS), facts=facts)
    checks: dict[str, Check] = {}
    if "check" in settings.only:
        checks = check_layouts(session.config, chosen, session.batch, settings.micro_batch, settings.sequence, device)
    rows: list[Row] = []
    for contestant in chosen:
        check = checks.get(contestant.name)
        details: dict[str, Any] = {} if check is None else {"check": asdict(check)}
        if check is None or check.passed:
            measured, planned = _measure_one(session, contestant), session.planned(contestant)
            details |= {"measured": measured.to_dict(), "planned": asdict(planned)}
            rows = rows_of(rows, contestant, measured, planned, session.config, session.batch, settings.sequence)
        facts["layouts"][contestant.name] = details
        report = Report(**_fields(report) | {"rows": tuple(rows)})
        if dist.get_rank() == 0:  # after every layout, so that the file survives a later one's end
            report.save(_path(settings, report))
            _show(contestant, details, rows)
    return report


def _show(contestant: Contestant, details: dict[str, Any], rows: Sequence[Row]) -> None:
    """Prints the figures of one layout, beside standard output."""
    print(f"{contestant.name}: {details.get('check', 'not checked')}", file=sys.stderr)
    for row in rows:
        if contestant.name in row.results:
            results = {contestant.name: row.results[contestant.name]}
            print(f"  {progress_line(replace(row, results=results))}", file=sys.stderr, flush=True)


def _fields(report: Report) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__dataclass_fields__}


def _prepare(s: Settings, device: torch.device) -> tuple[Session, list[Contestant], list[str]]:
    """Decides on the layouts, the layers and the batch."""
    world = dist.get_world_size()
    config = da.DeepseekConfig.from_pretrained(s.config).replace(quantization_config=None)
    dtype = torch.bfloat16 if s.dtype == "bfloat16" or (s.dtype == "auto" and device.type == "cuda") else torch.float32
    if s.layers:
        config = cut_config(config, s.layers)
    elif device.type != "cuda":
        config = cut_config(config, min(2, config.num_hidden_layers))
    batch = s.batch or 4 * world * s.micro_batch
    chosen, notes = contestants_of(s.layout, s.schedule, config, world, batch, s.micro_batch, s.sequence)
    session = Session(s, config, device, dtype, batch)
    if not s.layers and device.type == "cuda":
        free = 0.9 * torch.cuda.get_device_properties(device).total_memory
        setups = [session.setup(contestant) for contestant in chosen]
        session = Session(s, config_within(config, free, chosen, setups), device, dtype, batch)
    return session, chosen, notes


def _measure_one(session: Session, contestant: Contestant) -> Measured:
    """Measures everything that was asked for of one layout."""
    s, device, layout, out = session.settings, session.device, contestant.layout, Measured()
    memory = PeakMemory(device)
    run = session.training(contestant)
    first = run.step(0)
    out.first_loss, out.first_norm = first.loss, first.norm
    if "step" in s.only:
        out.seconds = time_steps(run.step, device, s.rounds, s.warmup)
    if "memory" in s.only:
        out.memory = gathered(memory.beyond())
    if "bytes" in s.only:
        out.sent, out.calls, out.purposes = map(list, zip(*gathered(count_bytes(run)), strict=True))
    if "overlap" in s.only:
        # NCCL's kernels of sends are those of all-to-all, and without a pipeline nothing else is sent.
        out.overlaps = gathered(profile_step(run.step, device, "send" if layout.pp > 1 else "all_to_all"))
    if "bubble" in s.only and layout.pp > 1:
        setup = session.setup(contestant)
        out.bubbles, out.simulated = measure_bubble(run, device, setup and (setup.schedule, setup.chunks))
    if "dispatch" in s.only and layout.ep > 1:
        per_node = _ranks_per_node(s.ranks_per_node, layout.ep)
        ways = [way for way in s.dispatch if layout.etp == 1 or way == "rows"]
        out.dispatches = time_dispatches(run, ways, per_node, device, s.rounds, s.warmup)
    if "decode" in s.only and layout.pp * layout.cp == 1:
        sizes = {"batch": s.decode_batch, "prompt": s.decode_prompt, "new_tokens": s.decode_tokens}
        out.decoding = measure_decoding(run, device, **sizes, rounds=s.rounds)
    del run
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return out


def _ranks_per_node(given: int, ep: int) -> int:
    """Returns the ranks of ep that "nodes" takes for a node: at most those of this machine, and a divisor of ep."""
    most = given or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or ep
    return next(size for size in range(min(most, ep), 0, -1) if ep % size == 0)


def _path(settings: Settings, report: Report) -> Path:
    name = f"parallel-{device_slug(report.machine)}-{dist.get_world_size()}-ranks.json"
    return Path(settings.out) if settings.out else RESULTS / name


def main(settings: Settings) -> int:
    """Runs the command `parallel`: 0 if every layout agrees with one process, else 1.

    Raises:
        ValueError: it was not started by torchrun, or as `measure`.
    """
    if not dist.is_torchelastic_launched():
        raise ValueError(f"expected to be started by torchrun: {START}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(settings.threads)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        report = measure(settings, device)
        if dist.get_rank() == 0:
            print(summary_table(report).to_text())
            print(f"saved {_path(settings, report)}")
        layouts = report.facts["layouts"].values()
        return 0 if all(each.get("check", {}).get("passed", True) for each in layouts) else 1
    finally:
        dist.destroy_process_group()
