"""A loop of accelerate's with balancing, in a module of its own: processes that are started for it import little."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import accelerate
import torch
from torch.utils.data import DataLoader

import deepseek_arch as da
from deepseek_arch.moe.expert_load import ExpertLoad
from deepseek_arch.moe.load_balancer import routers
from support import small_models

CONFIG = small_models.config("v3", num_nextn_predict_layers=1)
RATE = 0.25


def biases(model) -> dict[str, torch.Tensor]:
    return {name: router.e_score_correction_bias.clone() for name, router in routers(model).items()}


def accelerated(rows: torch.Tensor, accumulation: int, batch: int) -> tuple[list[ExpertLoad], dict[str, torch.Tensor]]:
    """One optimizer step after `accumulation` batches -> the report of every step, and the biases at the end."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = small_models.model(CONFIG).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # biases alone move: what is counted can be compared
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=batch))
    balancer = da.LoadBalancer(model, RATE)
    reports = []
    for ids in loader:
        with accelerator.accumulate(model):
            out = model(ids, labels=ids)
            accelerator.backward(out.loss + 0.3 * out.mtp_loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:  # this was an optimizer's step
                reports.append(balancer.step())
    return reports, biases(accelerator.unwrap_model(model))


def on_rank(rank: int, port: int, results: MutableMapping[int, object]) -> None:
    """One of two processes: leaves its reports and biases under its number."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "ACCELERATE_USE_CPU": "true",
    }
    reports, moved = accelerated(small_models.tokens(CONFIG, 16, 9), 2, 2)
    results[rank] = (
        [{name.removeprefix("module."): load.tolist() for name, load in each.loads.items()} for each in reports],
        {name: bias.tolist() for name, bias in moved.items()},
    )
    torch.distributed.destroy_process_group()
