"""A small model trained by several processes, saved, and gone on with on another layout: an example to start from.

    torchrun --nproc-per-node 4 -m benchmarks.training.many_devices --layout tp=2,ep=2 --steps 20 --checkpoints my-run
    torchrun --nproc-per-node 4 -m benchmarks.training.many_devices --layout ep=2 --steps 40 --resume my-run/20

The model is that of `benchmarks.training.mini`. It is built without memory, cut over the processes, and only then
given weights, which depend on the seed alone; so do the batches. The loss of a step is the same, up to rounding, on
every layout, and after a checkpoint of any other one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import parse_axes

from ..core.options import parse_settings
from .corpus import random_rows, repository_text
from .mini import Recipe, default_device, mini_config

__all__ = ["Settings", "main", "train"]


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """A training run over several processes.

    Raises:
        ValueError: a size that is not positive.
    """

    steps: Annotated[int, "optimizer steps, those before a checkpoint included"] = 40
    layout: Annotated[str, "axes; what they leave of the processes is dp_shard"] = "tp=2,ep=2"
    layers: Annotated[int, "layers of the model"] = 8
    checkpoints: Annotated[str, "folder of checkpoints, each named by its number of steps; '' for none"] = ""
    every: Annotated[int, "steps between checkpoints"] = 20
    resume: Annotated[str, "checkpoint to go on from; '' for none"] = ""
    publish: Annotated[str, "folder for the trained model in published files; '' for none"] = ""
    threads: Annotated[int, "threads of torch in each process"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, self.every) < 1:
            raise ValueError(f"expected positive sizes, got {self}")


def train(
    settings: Settings, text: Tensor, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> dict[int, float]:
    """Trains on the ranks of the default process group; every rank calls this.

    Args:
        text: token ids [N], the same on all ranks.
        on_step: called on every rank after each step, with its number and its loss.

    Returns:
        The loss over all rows of each step, by its number, in nats; V3's small balance loss is part of it.
    """
    config = mini_config().replace(num_hidden_layers=settings.layers)
    model = da.DeepseekLM(config, device="meta", dtype=torch.float32)
    da.parallelize(model, da.ParallelLayout(**parse_axes(settings.layout)))
    da.init_weights(model, settings.seed, default_device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    balancer = da.LoadBalancer(model, rate=settings.balance)
    first = 0
    if settings.resume:
        da.load_sharded(model, settings.resume, optimizer)
        first = int(next(iter(optimizer.state.values()))["step"])
    losses: dict[int, float] = {}
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * settings.schedule(step)
        losses[step + 1] = _step(model, optimizer, _rows(text, settings, step, model))
        balancer.step()
        on_step(step + 1, losses[step + 1])
        if settings.checkpoints and (step + 1) % settings.every == 0:
            da.save_sharded(model, Path(settings.checkpoints) / str(step + 1), optimizer)
    if settings.publish:
        da.save(model, settings.publish)
    return losses


def _rows(text: Tensor, settings: Settings, step: int, model: da.DeepseekLM) -> Tensor:
    """Returns this rank's rows of a batch that all ranks draw alike; those of a context-parallel group share theirs."""
    draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    rows, layout = random_rows(text, settings.batch, settings.sequence + 1, draw), model.meshes.layout
    if settings.batch < layout.dp:
        raise ValueError(f"expected a row for each of {layout.dp} data-parallel ranks, got {settings.batch}")
    return rows.tensor_split(layout.dp)[dist.get_rank(model.meshes.data) // layout.cp].to(model.device)


def _step(model: da.DeepseekLM, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
    """Makes one step on the rows of all ranks, and returns its loss."""
    out = model(rows, labels=rows, return_logits=False)
    da.global_loss(out, 0.3, model.meshes.data).backward()
    da.clip_grad_norm(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss = da.global_loss(out, 0.0, model.meshes.data).detach()
    dist.all_reduce(loss, group=model.meshes.data)
    return float(loss) / dist.get_world_size(model.meshes.data)


def main(arguments: Sequence[str]) -> None:
    settings = parse_settings("python -m benchmarks.training.many_devices", Settings, __doc__ or "", arguments)
    if not dist.is_torchelastic_launched():
        raise SystemExit("expected to be started by torchrun: torchrun --nproc-per-node 4 -m ... (see --help)")
    torch.set_num_threads(settings.threads)
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    shown = dist.get_rank() == 0

    def report(step: int, loss: float) -> None:
        if shown:
            print(f"step {step:5}  loss {loss:.4f}", flush=True)

    try:
        train(settings, repository_text(), report)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
